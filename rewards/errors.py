"""What went wrong in a reward."""


class RewardError(RuntimeError):
    """A reward that cannot be found or made, raised, or returned something else than one finite float per candidate.

    The message names the reward, the groups by example id, and the original traceback where there is one.
    """


class RewardTimeoutError(RewardError):
    """A reward that has not answered in time; the message names the reward and the groups it was given."""


def name_examples(example_ids: list[int], most: int = 8) -> str:
    """`group 7`, or `groups 7, 8, 9 and 5 more`: how messages name groups by their example ids."""
    named = ", ".join(str(example_id) for example_id in example_ids[:most])
    more = f" and {len(example_ids) - most} more" if len(example_ids) > most else ""
    return f"group{'s' if len(example_ids) > 1 else ''} {named}{more}"
