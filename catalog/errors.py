"""What is wrong with the data that a person brought, in words for them."""

from collections.abc import Iterable


class CatalogError(ValueError):
    """Input that makes no catalogue. The message names the file, column, row and value, and says what to do."""


def name_files(names: Iterable[str], most: int = 10) -> str:
    """`a, b and 5 more`: how messages name what a folder holds."""
    held = sorted(names)
    more = f" and {len(held) - most} more" if len(held) > most else ""
    return (", ".join(held[:most]) or "nothing") + more
