"""The configuration refuses what cannot work and names it."""

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from launch.compose import compose, load, save
from launch.config import Config, ConfigError
from launch.group_yaml import CONFIGS
from launch.ranges import POSITIVE
from learner.config import LearnerConfig


def test_later_groups_and_overrides_win() -> None:
    config = compose(cluster="8xA100", overrides=["learner.zero_stage=3", "train.eval_ks=[1,10]"])
    assert config.rollout.workers == 4
    assert config.learner.zero_stage == 3
    assert config.train.eval_ks == [1, 10]


def test_a_config_is_saved_in_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    config = compose(overrides=["name=Größe"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("group", ["cluster", "data", "model", "algorithm"])
def test_every_committed_group_composes(group: str) -> None:
    for path in (CONFIGS / group).glob("*.yaml"):
        compose(**{group: path.stem})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.zero_stag=3", "zero_stag"),
        ("learner.zero_stage=7", "zero_stage"),
        ("train.steps=many", "many"),
        ("rollout.group_size=1", "rollout.group_size=1: a group needs 2 candidates or more"),
        ("rollout.temperature=0", "rollout.temperature=0.0: must be greater than 0"),
        ("train.eval_ks=[1,100]", "train.eval_beams"),
        ("learner.optimizer.warmup_ratio=2", "learner.optimizer.warmup_ratio=2.0: must lie between 0 and 1"),
        ("learner.sft.optimizer.warmup_ratio=3", "learner.sft.optimizer.warmup_ratio=3.0: must lie between 0 and 1"),
        ("learner.optimizer.betas=[0.9,1]", "learner.optimizer.betas=1.0: must be at least 0 and less than 1"),
        ("learner.sft.optimizer.eps=0", "learner.sft.optimizer.eps=0.0: must be greater than 0"),
        ("learner.importance_cap=0", "learner.importance_cap=0.0: must be greater than 0"),
        ("learner.lora.dropout=1", "learner.lora.dropout=1.0: must be at least 0 and less than 1"),
        ("model.heads=0", "model.heads=0: must be greater than 0"),
        ("rewards=[]", "at least one reward"),
        ("rewards=rule", "write a list of terms, such as rewards='[{name: rule},{name: ranking}]'"),
        ("rewards=[rule, ranking]", "write a list of terms, such as rewards='[{name: rule},{name: ranking}]'"),
        ("rewards=[{nam: rule}]", "keys of RewardTerm: name, weight, label"),
        ("train.eval_ks=10", "expected a list, such as [...] (at train.eval_ks)"),
        ("rewards.0.weight=2", "write the whole list, such as rewards="),
        ("rewards[1].weight=2", "write the whole list, such as rewards="),
        ("name=../elsewhere", "plain folder name"),
        ("name=q?", "/runs/q?: DeepSpeed and vLLM take *, ? and [ in a path for a pattern"),
        ("runs='some[1]'", "/some[1]/default: DeepSpeed and vLLM take"),
        ("data.cache=a*", "/a*: DeepSpeed and vLLM take"),
        ("model.path=qwen[2]", "/qwen[2]: DeepSpeed and vLLM take"),
        ('name="a\\tb"', "must be text that can be shown"),
        ("train.trackers=[a.b:C,a.b:C]", "names one twice"),
        ("learner.lora={rank: 2, target_modules: []}", "learner.lora.target_modules=[]: adapters"),
        ("train.rollouts_every=0", "train.rollouts_every=0: must be greater than 0"),
        ("train.epochs=-3", "train.epochs=-3.0: must be greater than 0"),
        ("train.epochs=.inf", "train.epochs=inf: must be finite"),
        ("learner.optimizer.learning_rate=.inf", "learner.optimizer.learning_rate=inf: must be finite"),
        ("learner.optimizer.weight_decay=.inf", "learner.optimizer.weight_decay=inf: must be finite"),
        ("learner.sft.optimizer.eps=.inf", "learner.sft.optimizer.eps=inf: must be finite"),
        ("rollout.timeout_s=.inf", "rollout.timeout_s=inf: must be finite"),
        ("learner.beta=.inf", "learner.beta=inf: must be finite"),
        ("rollout.timeout_s=1e30", "rollout.timeout_s=1e+30: must be 1e8 (three years) or less"),
        ("data.max_history=99999999999999999999", "data.max_history=99999999999999999999: must be 10^8 or less"),
        ("train.steps=99999999999999999999", "train.steps=99999999999999999999: must be 10^8 or less"),
        ("learner.threads=1000000000", "learner.threads=1000000000: must be 10^8 or less"),
        ("data.generated.items=1000000000000", "data.generated.items=1000000000000: must be 1,000,000 or less"),
        ("train.eval_ks=[[1]]", "each cut-off must lie between 1 and train.eval_beams"),
        (f"name={'x' * 300}", "is too long for the name of a folder"),
        ("rollout.timeout_s=0", "rollout.timeout_s=0.0: must be greater than 0"),
        ("train.seed=-1", "train.seed=-1: must be at least 0 and less than 2^62"),
        ("model.seed=99999999999999999999", "model.seed=99999999999999999999: must be at least 0 and less than 2^62"),
        ("rollout.max_completion_tokens=0", "rollout.max_completion_tokens=0: must be greater than 0"),
        ("steps", "section.key=value"),
        ("train.steps=???", "override 'train.steps=???': train.steps is ???, which stands for no value"),
        ('rewards=[{name: "???"}]', "rewards.0.name is ???, which stands for no value"),
        ("train.steps=010", "override 'train.steps=010': YAML takes a number that begins with 0 for octal"),
        ("name=007", "YAML takes a number that begins with 0 for octal"),
        ("rewards.0.weight=3", "override 'rewards.0.weight=3'"),
        ("learner={", "override 'learner={'"),
    ],
)
def test_a_bad_override_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides=[override])
    assert message in str(error.value)


def numeric_keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Every key that holds one number, or may hold one."""
    for name, kind in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if is_dataclass(value):
            yield from numeric_keys(value, f"{prefix}{name}.")
        elif {int, float} & {kind, *get_args(kind)} and not isinstance(value, list | tuple):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("key", numeric_keys(Config()))
@pytest.mark.parametrize("value", ["-1", ".nan"])
def test_no_number_may_be_negative_or_undefined(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        compose(overrides=[f"{key}={value}"])


@pytest.mark.parametrize("key", POSITIVE)
def test_what_must_be_positive_may_not_be_zero(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=0.*: must be greater than 0"):
        compose(overrides=[f"{key}=0"])


@pytest.mark.parametrize(
    "override",
    [
        "learner.beta=0",
        "learner.clip_low=0",
        "learner.clip_low=1",
        "learner.lora.dropout=0",
        "learner.optimizer.betas=[0,0]",
        "learner.optimizer.gradient_clipping=0",
        "learner.optimizer.warmup_ratio=0",
        "learner.optimizer.warmup_ratio=1",
        "learner.optimizer.weight_decay=0",
        "train.staleness=0",
    ],
)
def test_a_number_may_lie_on_the_edge_of_its_range(override: str) -> None:
    compose(overrides=[override])


@pytest.mark.parametrize(
    "override", ["learner.clip_low=1.1", "learner.optimizer.betas=[1,0.9]", "learner.reference_sync_alpha=2"]
)
def test_a_number_may_not_lie_beyond_the_edge_of_its_range(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        compose(overrides=[override])


def test_an_unknown_key_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        compose(overrides=["learner.optimizer.lr=1"])


def test_an_unknown_group_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"CLUSTER=9xB200.*8xA100.*local"):
        compose(cluster="9xB200")
    with pytest.raises(ConfigError, match=r"DATA=missing/folder: neither a folder nor a YAML file nor one of"):
        compose(data="missing/folder")


def test_a_folder_stands_for_itself(tmp_path: Path) -> None:
    config = compose(data=str(tmp_path), model=str(tmp_path))
    assert config.data.path == config.model.path == str(tmp_path)


@pytest.mark.parametrize("group", ["cluster", "data", "model", "algorithm"])
def test_a_path_in_any_yaml_counts_as_naming_one(tmp_path: Path, group: str) -> None:
    """So that a whole configuration can stand in one file, without the settings of our own small model and data."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"model: {{path: {tmp_path}}}\ndata: {{path: {tmp_path}}}\ntrain: {{prompts_per_step: 16}}\n")
    bare = tmp_path / "bare.yaml"
    bare.write_text("{}\n")
    profile = {"cluster": str(bare)} if group == "cluster" else {}  # no settings of `local` either
    named = ["train.prompts_per_step=16", f"model.path={tmp_path}", f"data.path={tmp_path}"]
    expected = compose(**profile, overrides=named)
    config = compose(**{group: str(whole)})
    assert replace(config, cluster=expected.cluster) == expected


def test_the_config_of_a_run_is_a_whole_one(tmp_path: Path) -> None:
    for number, changed in enumerate(([], [f"model.path={tmp_path}", f"data.path={tmp_path}", "train.steps=7"])):
        first = compose(algorithm="gspo", overrides=changed)
        save(first, tmp_path / f"{number}.yaml")
        assert compose(algorithm=str(tmp_path / f"{number}.yaml")) == first


@pytest.mark.parametrize(
    ("named", "said", "message"),
    [
        (
            {"model": "{folder}"},
            "model: {path: elsewhere}",
            r"MODEL=.* has model.path=.*later.yaml.*'elsewhere': leave",
        ),
        ({"model": "{folder}"}, "model: {path: null}", r"MODEL=.* has model.path=.*later.yaml.*None: leave one"),
        ({"data": "{folder}"}, "data: {path: elsewhere}", r"DATA=.* has data.path=.*later.yaml"),
        ({"cluster": "8xA100"}, "cluster: {name: local}", r"CLUSTER=8xA100 has cluster.name='8xA100'.*later.yaml"),
    ],
)
def test_a_later_yaml_does_not_undo_what_was_named(
    tmp_path: Path, named: dict[str, str], said: str, message: str
) -> None:
    later = tmp_path / "later.yaml"
    later.write_text(f"{said}\n")
    chosen = {group: choice.format(folder=tmp_path) for group, choice in named.items()}
    with pytest.raises(ConfigError, match=message):
        compose(**chosen, algorithm=str(later))
    later.write_text("train: {steps: 3}\nmodel: {}\n")
    assert compose(**chosen, algorithm=str(later)).train.steps == 3
    for odd in ("model: 3", "data: [1]", "cluster: 3"):  # said as before
        later.write_text(f"{odd}\n")
        with pytest.raises(ConfigError, match=r"later\.yaml: "):
            compose(**chosen, algorithm=str(later))


def test_a_saved_config_loads_as_the_same(tmp_path: Path) -> None:
    config = compose(overrides=["rewards=[{name: rule, weight: 2, args: {a: [1]}}]", "learner.clip_low=0.2"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml does not exist"):
        load(tmp_path / "config.yaml")


def test_candidates_outside_the_trie_have_no_log_probability_over_it() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.logprob_space=trie: rollout\.strategy=unconstrained"):
        compose(overrides=["rollout.strategy=unconstrained", "rollout.logprob_space=trie"])


def test_workers_hold_weights_in_the_learners_precision() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.dtype=bfloat16: .*learner\.dtype=float32"):
        compose(overrides=["rollout.dtype=bfloat16"])


def test_a_profile_of_ones_own_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("rollout: {workers: 3}\nlearner: {micro_batch_tokens: 9999}\n")
    assert compose(cluster=str(profile)).rollout.workers == 3
    monkeypatch.chdir(tmp_path)
    first = compose(cluster="mine.yaml", overrides=["rollout.timeout_s=77"])
    assert first.cluster.name == str(profile)
    started = tmp_path / "config.yaml"
    save(first, started)
    assert compose(cluster=str(profile), started=started) == first
    here = compose(cluster="local", started=started)
    assert (here.cluster.name, here.rollout.workers, here.rollout.timeout_s) == ("local", 1, 77)
    assert here.learner.micro_batch_tokens == compose().learner.micro_batch_tokens
    save(here, started)
    assert compose(cluster="mine.yaml", started=started).rollout.workers == 3
    profile.unlink()
    save(first, started)
    with pytest.raises(ConfigError, match=r"CLUSTER=.*mine\.yaml: neither a YAML file"):
        compose(cluster="local", started=started)  # nobody knows what was the profile's
    with pytest.raises(ConfigError, match=r"CLUSTER=.*mine: neither a YAML file nor one of configs/cluster: 1xGPU"):
        compose(cluster=str(tmp_path / "mine"))


def test_a_folder_beside_a_yaml_of_its_name_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "titles").mkdir()
    (tmp_path / "titles.yaml").write_text("data: {path: elsewhere}\n")
    assert compose(data=str(tmp_path / "titles")).data.path == str(tmp_path / "titles")


def test_a_placeholder_that_stands_for_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.template\.item: .*'title' not found"):
        compose(overrides=["data.template.item='${title}'"])
    with pytest.raises(ConfigError, match=r"runs: .*NO_SUCH_VARIABLE"):
        compose(overrides=["runs=${oc.env:NO_SUCH_VARIABLE}/x"])


def test_a_name_of_the_hub_stands_for_itself_and_brings_no_settings() -> None:
    named = compose(model="Qwen/Qwen3-0.6B")
    assert named.model.path == "Qwen/Qwen3-0.6B"
    assert named.learner.optimizer == LearnerConfig().optimizer
    assert named.learner.sft == LearnerConfig().sft
    assert compose(overrides=["model.path=Qwen/Qwen3-0.6B"]) == named
    assert compose(overrides=["model.path=null"]) == compose()
    with pytest.raises(ConfigError, match=r"MODEL=mine.yaml: neither .* nor organisation/name of the"):
        compose(model="mine.yaml")
    with pytest.raises(ConfigError, match=r"MODEL=models/mine.yaml: neither"):
        compose(model="models/mine.yaml")


def test_an_own_path_of_data_leaves_the_settings_of_the_embedded_data_out(tmp_path: Path) -> None:
    assert compose(overrides=[f"data.path={tmp_path}"]) == compose(data=str(tmp_path))
