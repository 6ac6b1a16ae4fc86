"""`rere reward train-sasrec`: the recommender behind the collaborative reward, trained on the run's own catalogue."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from catalog.atomic import check_writable
from catalog.build import build_catalog
from launch.compose import compose
from launch.config import ConfigError
from launch.model import prepare_model
from rewards.sasrec import SASRecShape
from rewards.train_sasrec import SASRecTraining, train_sasrec


def main(arguments: Sequence[str]) -> int:
    """Build the catalogue of --data, train, report HR and NDCG, write the weights; 0 when it succeeded."""
    options = _parser().parse_args(arguments)
    file = options.out or Path("models") / f"sasrec-{Path(options.data).resolve().name}.safetensors"
    if file.is_dir():
        raise ConfigError(f"OUT={file} is a folder; name a file in it, such as {file / 'sasrec.safetensors'}")
    check_writable(file)
    config = compose(data=options.data, model=options.model, overrides=options.overrides)
    catalog = build_catalog(config.data, str(prepare_model(config)))
    shape = {"max_history": config.data.max_history, **_given(options, SASRecShape)}
    metrics = train_sasrec(catalog, file, SASRecTraining(**_given(options, SASRecTraining)), **shape)
    for split in ("valid", "test"):
        words = [f"{name.removeprefix(split + '/')} {value:.4f}" for name, value in metrics.items() if split in name]
        print(f"{split}: {'  '.join(words)}")
    print(f"use it: {{name: collaborative, args: {{model: {file}}}}}")
    return 0


def _given(options: argparse.Namespace, kind: type[SASRecTraining] | type[SASRecShape]) -> dict[str, Any]:
    """The fields of a dataclass that were given as options."""
    names = [key.name for key in fields(kind)]
    return {name: value for name, value in vars(options).items() if name in names and value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rere reward train-sasrec", description=__doc__)
    parser.add_argument("--data", default="embedded", help="a file of configs/data or a folder")
    parser.add_argument("--model", default="small", help="whose tokenizer builds the catalogue; SASRec ignores it")
    parser.add_argument("--out", type=Path, help="file of the weights; models/sasrec-DATA.safetensors by default")
    for key in (*fields(SASRecTraining), *fields(SASRecShape)):
        if key.default is not MISSING and key.name != "max_history":
            parser.add_argument(f"--{key.name}", type=type(key.default), help=f"({key.default})")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser
