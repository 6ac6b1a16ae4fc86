"""What `rere keys` says of the configuration."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.config import Config, ConfigError
from launch.keys import as_markdown, keys, main
from rewards.config import RewardTerm

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def test_every_key_is_listed_once_with_its_default_and_its_meaning() -> None:
    listed = {key.name: key for key in keys()}
    assert len(listed) == len(keys())
    assert all(key.meaning for key in listed.values())
    tree = OmegaConf.structured(Config)
    for name, key in listed.items():
        if name.startswith("rewards[]."):
            assert OmegaConf.create(f"value: {key.default}").value == getattr(RewardTerm(), name.partition(".")[2])
        elif name != "data.template.prompt":  # shown in short
            assert OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{name}={key.default}"])) == tree, name
    assert {name.partition(".")[0].removesuffix("[]") for name in listed} == set(tree)


def test_nested_sections_show_their_own_defaults() -> None:
    listed = {key.name: key.default for key in keys()}
    assert float(listed["learner.optimizer.learning_rate"]) == 1e-5
    assert float(listed["learner.sft.optimizer.learning_rate"]) == 3e-4


def test_the_reference_is_what_is_printed() -> None:
    assert REFERENCE.read_text() == as_markdown(), "write it anew: rere keys --markdown > docs/configuration.md"


def test_a_word_finds_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learner.clip"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed[::2]] == ["learner.clip_low", "learner.clip_high"]
    assert printed[1].strip().startswith("Lower clipping bound")


def test_an_unknown_word_is_answered_with_what_is_near() -> None:
    with pytest.raises(ConfigError, match=r"no key is called 'learner.bta' or holds it; did you mean learner.beta"):
        main(["learner.bta"])
