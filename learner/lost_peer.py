"""Whether a rank failed only because another one is gone or late."""

from torch import distributed

SIGNS = (
    "connection reset",
    "connection closed",
    "broken pipe",
    "timed out",
    "timeout caused pair closure",
    "ncclremoteerror",
    "ncclsystemerror",
    "nccl communicator was aborted",
    "collective operation timeout",
)
"""What Gloo and NCCL say, in lower case, when they lose a peer: both raise the same type for other faults as well."""


class Rank0Failed(RuntimeError):
    """What rank 0 did for all ranks has failed there."""


def lost_a_peer(error: Exception) -> bool:
    """Whether `error` is how a collective, or the store where ranks meet, fails without another rank.

    The type decides first: an error of any other kind is the rank's own, whatever its text quotes.
    """
    if isinstance(error, Rank0Failed | distributed.DistNetworkError | distributed.DistStoreError):
        return True
    text = str(error).lower()
    of_gloo = type(error) is RuntimeError and "/gloo/" in text  # the source file, which its errors begin with
    of_nccl = isinstance(error, distributed.DistBackendError)
    return (of_gloo or of_nccl) and any(sign in text for sign in SIGNS)
