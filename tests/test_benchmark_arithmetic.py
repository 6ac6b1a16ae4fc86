"""The arithmetic that shares of the matrix peak are taken of is what torch counts."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.arithmetic import Arithmetic, Work, packed_work
from learner.policy import Policy
from tests.test_policy import SHAPE, groups

TOKENS = 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arithmetic")
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(path)
    return path


def test_a_pass_that_wants_all_logits_is_hugging_faces(model_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        lm(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    every = Work(TOKENS, TOKENS**2, TOKENS, TOKENS**2)  # eager attention computes what it masks, too
    assert Arithmetic(model_path).forward(every) == counted.get_total_flops()


def test_a_packed_pass_needs_no_more_than_the_policy_computes(model_path: Path) -> None:
    policy = Policy(AutoModelForCausalLM.from_pretrained(model_path))
    batch = policy.pack(*groups())
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        policy(batch)
    needed = Arithmetic(model_path).forward(
        packed_work([batch])
    )  # a whole last layer would make it 0.89, attention's masked part is missing
    assert 0.6 * counted.get_total_flops() < needed < 0.8 * counted.get_total_flops()
