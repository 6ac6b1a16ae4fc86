"""The sample catalogue of the rewards as a real one on disk, and groups over it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catalog.build import build_catalog
from catalog.catalog import Catalog
from catalog.config import DataConfig
from rewards.samples import EXAMPLES, TITLES
from rollout.groups import Candidates, group_table


def build_sample_catalog(folder: Path, tokenizer_dir: Path) -> Catalog:
    """rewards.samples.TITLES and EXAMPLES, the latter as every split; item class c is title c."""
    pq.write_table(pa.table({"item_id": range(len(TITLES)), "title": TITLES}), folder / "items.parquet")
    users, histories, targets = zip(*EXAMPLES, strict=True)
    for number, split in enumerate(("train", "valid", "test")):
        columns = {
            "user_id": users,
            "history": pa.array(histories, pa.list_(pa.int32())),
            "target": pa.array(targets, pa.int32()),
            "timestamp": np.arange(len(users)) + 100 * number,
        }
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return build_catalog(DataConfig(path=str(folder), cache=str(folder / "cache")), str(tokenizer_dir))


def some_groups(count: int, size: int = 6, seed: int = 0) -> pa.Table:
    """`count` groups of distinct random titles; group g is example g % 4."""
    draw = np.random.default_rng(seed)
    rows = [row % len(EXAMPLES) for row in range(count)]
    groups = [
        Candidates(
            tokens=[np.array([3, 0], np.int32)] * size,
            logprobs=[np.array([-0.5, -0.1 * rank], np.float32) for rank in range(size)],
            item_class=draw.permutation(len(TITLES))[:size].astype(np.int32),
            score=-0.5 - 0.1 * np.arange(size, dtype=np.float32),
        )
        for _ in range(count)
    ]
    return group_table(rows, 3, [[1, 2]] * count, [EXAMPLES[row][2] for row in rows], groups)
