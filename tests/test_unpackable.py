"""Models that cannot be fed a packed tree are trained on padded batches, or refused."""

import warnings

import pytest
import torch
from test_policy import EOS, SHAPE, VOCABULARY, language_model
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    MambaConfig,
    NemotronConfig,
    Qwen3NextConfig,
    XGLMConfig,
)

from learner.policy import Policy

UNPACKABLE = {
    "recurrent": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY),
    "some-layers-linear": Qwen3NextConfig(**SHAPE, layer_types=["linear_attention"] + ["full_attention"] * 2),
    "own-positions": XGLMConfig(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, vocab_size=VOCABULARY),
    "mask-of-its-own": DogeConfig(**SHAPE, keep_window_size=4),
    "no-keyword-arguments": NemotronConfig(**SHAPE),
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_models_that_cannot_be_packed_fall_back_to_padding_with_one_warning(kind: str) -> None:
    lm = AutoModelForCausalLM.from_config(UNPACKABLE[kind]).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = Policy(lm)
    assert len([str(warning.message) for warning in caught if "padded batches" in str(warning.message)]) == 1
    assert policy.packing == "padded"
    batch = policy.pack([[1, 2]], [[[3, EOS], [4, EOS]]])
    found = policy(batch)
    for row, last in zip(found, (3, 4), strict=True):
        expected = lm(input_ids=torch.tensor([[1, 2, last]])).logits.log_softmax(-1)[0]
        torch.testing.assert_close(row, expected[[1, 2], [last, EOS]], rtol=1e-4, atol=1e-4)


def test_a_model_whose_packed_tree_gives_other_numbers_falls_back_too() -> None:
    """As one whose layers look at their neighbours in the row by other means than attention."""
    lm = language_model("llama")
    lm.base_model.layers[0].register_forward_hook(lambda layer, inputs, output: output + output.roll(1, dims=1))
    with pytest.warns(UserWarning, match="LlamaForCausalLM is trained on padded batches: its log-probabilities in a"):
        assert Policy(lm).packing == "padded"
    assert lm.config._attn_implementation != "tree"


def test_a_model_that_hides_its_decoder_is_refused() -> None:
    lm = language_model("llama")
    lm.base_model_prefix = "elsewhere"
    with pytest.raises(NotImplementedError, match=r"no decoder under the name of its base_model_prefix \('elsewhere'"):
        Policy(lm)
