"""What titles may hold acts on nothing that shows them."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.visible import visible


@given(st.text())
def test_what_is_shown_has_no_controls(text: str) -> None:
    shown = visible(text)
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, shown))
    assert visible(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Bolt\x1b[31m\0", r"Bolt\x1b[31m\x00"),
        ("Bolt\x9b31m\x7f", r"Bolt\x9b31m\x7f"),
        ("Bolt\r\n\tNut\u2028", r"Bolt\r\n\tNut\u2028"),
        ("Bolt \u202etuN\u2066", r"Bolt \u202etuN\u2066"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_what_acts_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    "title", ["Größe ½ [white] \\", "می\u200cخواهم", "مسمار صلب", "👩\u200d🔧 wrench", "工业 Ltd.", "Cafe\u0301\u00ad"]
)
def test_titles_of_any_script_stay_as_they_are(title: str) -> None:
    assert visible(title) == title
