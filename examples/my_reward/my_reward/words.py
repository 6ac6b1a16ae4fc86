"""A reward that is a plain function of one group."""

from rewards.group import Group


def near_miss(group: Group) -> list[float]:
    """The share of the target's words that each candidate's title has, so that a near miss counts for something."""
    wanted = set(group.target_title.lower().split())
    return [len(wanted & set(title.lower().split())) / len(wanted) for title in group.candidate_titles]
