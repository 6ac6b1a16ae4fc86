"""`rere recommend` apart from the policy: which titles are close to one that the catalogue does not have."""

import difflib

import pyarrow as pa

from launch.recommend import close_titles


def test_close_titles_of_a_small_catalogue_are_those_of_difflib() -> None:
    titles = ["Steel Bolt, 3 inch", "Steel Bolt, 4 inch", "Steel Nut", "Copper Wire", "Nu"]
    for asked in ("Steel Bolt, 5 inch", "Stel Nut", "Nut", "N", "Lamp"):
        assert close_titles(asked, pa.array(titles, pa.large_string())) == difflib.get_close_matches(asked, titles)


def test_close_titles_of_a_large_catalogue_are_found() -> None:
    titles = pa.array([f"Acme Bolt {i:06d}, Pack of {i % 97}" for i in range(100_000)], pa.large_string())
    assert close_titles("Acme Bolt 041234, Pack of 99", titles)[0].startswith("Acme Bolt 041234")
