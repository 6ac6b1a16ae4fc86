"""The embedded catalogue: generated, seeded, of any size, with the best possible ranking known."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from catalog.config import GeneratedConfig
from catalog.errors import CatalogError
from catalog.interactions import Interactions, SplitTable, cut_by_time, sliding_histories
from catalog.markov import Markov
from catalog.product_titles import DEPARTMENTS, product_titles
from catalog.ragged import Ragged

FEWEST_ITEMS, FEWEST_USERS = 4 * len(DEPARTMENTS), 20
SHORTEST, LONGEST, MEAN_EXTRA = 5, 20, 2.5
FIRST_DAY, DAYS = 1420070400, 1200
"""Users arrive evenly over DAYS days from 2015-01-01."""
DAY = 86400


def generate(config: GeneratedConfig, max_history: int) -> Interactions:
    """Items, and the examples of `config.users` users cut 80/10/10 in time order; the test split has best_rank.

    The same configuration gives the same data. Raises CatalogError for sizes from which no splits can be made.
    """
    if config.items < FEWEST_ITEMS or config.users < FEWEST_USERS or not 0 <= config.duplicates <= 0.5:
        raise CatalogError(
            f"data.generated needs items >= {FEWEST_ITEMS}, users >= {FEWEST_USERS} and duplicates from 0 to 0.5; "
            f"got items={config.items}, users={config.users}, duplicates={config.duplicates}"
        )
    draw = np.random.default_rng(config.seed)
    repeated = min(round(config.items * config.duplicates), config.items // 2)  # each of a title of its own
    titles = product_titles(config.items - repeated, draw)
    markov = Markov.over(titles, draw)
    title_of_item = draw.permutation(
        np.concatenate([np.arange(len(titles.text)), draw.permutation(len(titles.text))[:repeated]])
    )

    lengths = np.minimum(SHORTEST + draw.geometric(1 / (MEAN_EXTRA + 1), config.users) - 1, LONGEST)
    items = _items(markov.sample(lengths, draw).flat, title_of_item, draw)
    table = _examples(items, lengths, _times(lengths, draw), max_history)
    splits = {name: _slice(table, rows) for name, rows in cut_by_time(table.timestamp).items()}
    test = splits["test"]
    histories = Ragged(title_of_item[test.history.flat], test.history.start)
    splits["test"] = replace(test, best_rank=markov.best_rank(histories, title_of_item[test.target]))
    return Interactions(
        item_ids=pa.array(np.arange(config.items)),
        titles=pa.array([titles.text[title] for title in title_of_item.tolist()], pa.large_string()),
        splits=splits,
    )


def _items(titles: np.ndarray, title_of_item: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """int64 [total]: for each title an item that bears it, at random where several do."""
    order = np.argsort(title_of_item, kind="stable")
    count = np.bincount(title_of_item)
    return order[(np.cumsum(count) - count)[titles] + draw.integers(count[titles])]


def _times(lengths: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """int64 [total]: seconds since 1970 of each interaction, increasing within a user; gaps of 15 days on average."""
    gaps = 1 + (draw.exponential(15 * DAY, int(lengths.sum()))).astype(np.int64)
    start = np.cumsum(lengths) - lengths
    gaps[start] = FIRST_DAY + draw.integers(DAYS * DAY, size=len(lengths))
    times = np.cumsum(gaps)
    return times - np.repeat(times[start] - gaps[start], lengths)


def _examples(items: np.ndarray, lengths: np.ndarray, times: np.ndarray, max_history: int) -> SplitTable:
    targets, histories = sliding_histories(items, lengths, max_history)
    order = np.argsort(times[targets], kind="stable")
    users = np.char.add("user-", np.repeat(np.arange(len(lengths)), lengths)[targets[order]].astype(str))
    return SplitTable(
        user_id=pa.array(users, pa.large_string()),
        history=histories.take(order),
        target=items[targets[order]].astype(np.int32),
        timestamp=times[targets[order]],
    )


def _slice(table: SplitTable, rows: slice) -> SplitTable:
    return SplitTable(
        user_id=table.user_id[rows],
        history=table.history.take(np.arange(rows.start, rows.stop)),
        target=table.target[rows],
        timestamp=table.timestamp[rows],
    )
