"""Texts of somebody's data as they may be shown: what would steer a terminal, or turn the writing, is spelled out."""

import unicodedata

STEERING = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of characters that are controls, half of a character, or the end of a line or paragraph."""
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Kinds of characters that turn the direction of the text that follows them, also beyond their own."""


def visible(text: str) -> str:
    r"""The text on one line, with escapes such as \x1b, \n or \u202e for what would act on the text around it."""
    return "".join(char.encode("unicode_escape").decode() if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    return unicodedata.category(char) in STEERING or unicodedata.bidirectional(char) in TURNING
