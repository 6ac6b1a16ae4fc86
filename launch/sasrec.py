"""`rere reward train-sasrec`: the recommender behind the collaborative reward, trained on the run's own catalogue."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from catalog.build import build_catalog
from launch.compose import compose
from launch.model import prepare_model
from rewards.train_sasrec import train_sasrec


def main(arguments: Sequence[str]) -> int:
    """Build the catalogue of --data, train, report HR and NDCG, write the weights; 0 when it succeeded."""
    options = _parser().parse_args(arguments)
    config = compose(data=options.data, model=options.model, overrides=options.overrides)
    catalog = build_catalog(config.data, str(prepare_model(config)))
    file = options.out or Path("models") / f"sasrec-{Path(options.data).name}.safetensors"
    metrics = train_sasrec(catalog, file, max_history=config.data.max_history)
    for split in ("valid", "test"):
        words = [f"{name.removeprefix(split + '/')} {value:.4f}" for name, value in metrics.items() if split in name]
        print(f"{split}: {'  '.join(words)}")
    print(f"use it: {{name: collaborative, args: {{model: {file}}}}}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rere reward train-sasrec", description=__doc__)
    parser.add_argument("--data", default="embedded", help="a file of configs/data or a folder")
    parser.add_argument("--model", default="small", help="whose tokenizer builds the catalogue; SASRec ignores it")
    parser.add_argument("--out", type=Path, help="file of the weights; models/sasrec-DATA.safetensors by default")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser
