"""A model has every weight from its files, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.pretrained import load_pretrained


def test_a_model_is_loaded_as_by_hugging_face(tiny_model_dir: Path) -> None:
    loaded = load_pretrained(str(tiny_model_dir), torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    assert type(loaded) is type(expected)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"hidden_size": 128},
            r"model\.embed_tokens\.weight is \[\d+, 64\] in the files, \[\d+, 128\] by config\.json \(and \d+ others",
        ),
        (
            {"vocab_size": 1000},
            r"model\.embed_tokens\.weight is \[\d+, 64\] in the files, \[1000, 64\] by config\.json; ",
        ),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            r"model\.layers\.2\.input_layernorm\.weight is missing \(and 11 others\)",
        ),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing; fetch"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    path = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=rf"model {path}: its weights are not those of its config\.json: {fault}"):
        load_pretrained(str(path), torch.float32)
