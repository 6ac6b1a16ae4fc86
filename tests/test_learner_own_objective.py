"""An objective of a run's own, on several ranks: whatever it does on one of them, all do the same."""

from dataclasses import replace

import learner_gang
import pytest
import ray
from learner_gang import assert_same_training

from learner.config import LearnerConfig, OptimizerConfig

gangs, learner_data = learner_gang.gangs, learner_gang.learner_data
CONFIG = LearnerConfig(
    beta=0.05, micro_batch_tokens=600, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0)
)


@pytest.fixture(scope="module")
def steps(learner_data):
    return [learner_data.tables(step) for step in range(3)]


OWN_OBJECTIVE = """
from torch.distributed import get_rank

from learner.objectives import objective

@objective(mean_over="completions")
def mine(batch, config):
    chosen = {names}
    metrics = {{name: batch.token_sum(batch.mask) + len(name) for name in chosen}}
    return -batch.token_mean(batch.logp) * batch.advantages, metrics
"""


def own_objective(folder, names):
    """The import path of an objective with metrics of these names, an expression."""
    (folder / "own.py").write_text(OWN_OBJECTIVE.format(names=names))
    return f"{folder}/own.py:mine"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "names", ["['a'] if batch.advantages[0] > 0 else []", "['a', 'every'] if len(batch.logp) > 4 else ['every']"]
)
def test_metrics_that_not_every_micro_batch_has_end_the_run_on_all_ranks(gangs, steps, tmp_path, ranks, names):
    config = replace(CONFIG, objective=own_objective(tmp_path, names))
    failed = [process.train.remote(config, steps) for process in gangs[ranks].processes]
    for rank in failed:
        with pytest.raises(Exception, match=r"ObjectiveError: objective .*:mine returned the metrics \['a'\] in some"):
            ray.get(rank, timeout=120)


@pytest.mark.parametrize("names", ["['a'] if get_rank() else []", "['a'] if get_rank() else ['b']"])
def test_metrics_that_not_every_rank_has_end_the_run_on_all_ranks(gangs, steps, tmp_path, names):
    config = replace(CONFIG, objective=own_objective(tmp_path, names))
    for rank in [process.train.remote(config, steps) for process in gangs[2].processes]:
        with pytest.raises(Exception, match=r"ObjectiveError: objective .*:mine returned the metrics \['a'"):
            ray.get(rank, timeout=120)


def test_metrics_may_come_in_any_order(gangs, steps, tmp_path):
    names = "['aa', 'b'][:: 1 if get_rank() else -1]"
    config = replace(CONFIG, objective=own_objective(tmp_path, names))
    found, plain = (
        gangs[2]("train", config, steps[:1])["metrics"][0],
        gangs[1]("train", config, steps[:1])["metrics"][0],
    )
    for name in ("aa", "b", "loss", "logprob", "completion_tokens"):
        assert found[name] == pytest.approx(plain[name], rel=1e-5), name
    assert found["aa"] == pytest.approx(found["b"] + 1)


OWN_ADVANTAGES = """
import numpy as np
from torch.distributed import get_rank

from learner.objectives import objective

def drawn(rewards, normalize_std):
    draw = np.random.default_rng(get_rank())
    return [draw.standard_normal(len(group)) * (draw.random() < 0.5) for group in rewards]

@objective(mean_over="completions", advantages=drawn)
def mine(batch, config):
    return -batch.token_mean(batch.logp) * batch.advantages, {}
"""


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_whose_own_advantages_would_differ_take_those_of_rank_0(gangs, learner_data, steps, tmp_path, stage):
    (tmp_path / "own.py").write_text(OWN_ADVANTAGES)
    config = replace(CONFIG, objective=f"{tmp_path}/own.py:mine", beta=0.0)
    alone = gangs[1]("train", config, steps)
    together = gangs[2]("train", replace(config, zero_stage=stage), steps)
    assert_same_training(together["weights"], alone["weights"], learner_data)
    assert 0 < alone["metrics"][0]["frac_uninformative"] == together["metrics"][0]["frac_uninformative"] < 1
