"""A model from its Hugging Face directory, with every weight from there: transformers makes up those that are not."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_pretrained(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of a Hugging Face directory.

    Raises ValueError naming a weight that its files do not have, or have in another shape than its configuration says.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    lm, report = loaded
    if misshapen := sorted(report["mismatched_keys"]):
        name, held, expected = misshapen[0]
        _refuse(path, f"{name} is {list(held)} in the files, {list(expected)} by config.json", misshapen)
    if missing := sorted(report["missing_keys"]):
        _refuse(path, f"{missing[0]} is missing", missing)
    return lm


def _refuse(path: str, fault: str, faults: Sequence[object]) -> None:
    others = f" (and {len(faults) - 1} others)" if len(faults) > 1 else ""
    raise ValueError(f"model {path}: its weights are not those of its config.json: {fault}{others}; fetch both again")
