"""Rank-GRPO: the unit is a rank of the recommended list, with its own advantage and its own ratio.

In the paper (arXiv 2510.20150) a prompt gets several lists and each list is one text of N items. The item at rank k of
list i has a reward, an advantage normalised over the lists at the same rank k, and one ratio: the geometric mean of
its tokens' ratios. Here a list is a group: its candidates in the order of the search, so rank k is candidate k.

- reward of a rank: the candidate's own reward, the paper's exp_inf variant. Its other variant, DCG@k:N, also credits a
  rank with the hits below it, because later items of one text are generated from earlier ones; the candidates of a
  search are not.
- advantage of a rank: over the lists of the update at the same rank (a prompt has one list here), of those lists that
  hold different rewards. So a miss at rank 0, where hits are common, weighs more than one at rank 15.
- ratio of a rank: the geometric mean over the candidate's tokens, clipped per rank.
"""

import torch

from learner.advantages import rank_advantages
from learner.config import LearnerConfig
from learner.objectives.base import CompletionBatch, Metrics, objective
from learner.objectives.gspo import gspo


@objective(mean_over="completions", advantages=rank_advantages)
def rank_grpo(batch: CompletionBatch, config: LearnerConfig) -> tuple[torch.Tensor, Metrics]:
    """-(rank ratio * rank advantage - beta * mean_t KL_t) per rank, mean over ranks (arXiv 2510.20150).

    A rank holds one candidate, so given the rank advantages the expression is GSPO's.
    """
    return gspo(batch, config)
