"""Files and folders that appear whole or not at all, also where several processes write the same one."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which is renamed to `path` at the end and replaces what is there.

    It lies beside `path`, whose folder is made where there is none. When the body raises, it is removed and `path` is
    left as it was.

    >>> with atomic_file(folder / "summary.json") as temporary:
    ...     temporary.write_text("{}")
    """
    temporary = _beside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which is renamed to `path` at the end; removed when the body raises.

    Where another process has made `path` meanwhile, that one is kept and this one removed: for folders whose name says
    what is in them. Raises OSError when the folder cannot be renamed for any other reason.
    """
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _beside(path: Path) -> Path:
    """A name of one's own in the folder of `path`; it ends otherwise, so that no pattern of finished files fits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")
