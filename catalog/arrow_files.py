"""Arrow files that are mapped into memory, so that every process on a machine shares one copy."""

from pathlib import Path

import pyarrow as pa

from catalog.errors import CatalogError


def write_arrow(path: Path, columns: dict[str, pa.Array]) -> None:
    """One uncompressed record batch, so that read_arrow gives each column in one piece without copying."""
    batch = pa.RecordBatch.from_pydict(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_arrow(path: Path, *names: str) -> pa.RecordBatch:
    """Map a file of write_arrow's with columns `names`. Raises CatalogError naming one that is missing or damaged."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        batch.select(names)
        return batch
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise CatalogError(
            f"{path}: not a readable catalogue file ({error}); delete {path.parent} and build it again"
        ) from error
