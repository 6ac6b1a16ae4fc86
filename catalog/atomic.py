"""Files and folders that appear whole or not at all, also where several processes write the same one."""

import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,
)
"""What a file system answers where nothing can be written, by no fault of the program."""

UNFINISHED = ".unfinished"
"""How the names of files and folders end that are not renamed yet."""
ABANDONED_S = 3600.0
"""Age from which a folder that no process holds is one whose process was killed."""


class CannotWrite(OSError):
    """A full disk, or a place where nothing may be written. The message names what was to be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise CannotWrite naming `path` where the file system refuses what the body writes, or its folder is gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS and path.parent.is_dir() and not _takes_no_files(path.parent, error):
            raise
        raise CannotWrite(f"{path} cannot be written: {error}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which is renamed to `path` at the end and replaces what is there.

    It lies beside `path`, whose folder is made where there is none; a link is followed. When the body raises, it is
    removed and `path` is left as it was.

    >>> with atomic_file(folder / "summary.json") as temporary:
    ...     temporary.write_text("{}")
    """
    with writing(path):
        path = _replaceable(path)
        temporary = _beside(path)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise CannotWrite now where `atomic_file` would raise it once there is something to write."""
    with writing(path):
        temporary = _beside(_replaceable(path))
        temporary.touch()
        temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which is renamed to `path` at the end; removed when the body raises.

    What processes that were killed have left of theirs is removed an hour later, by the next that makes `path`.
    Where another process has made `path` meanwhile, that one is kept and this one removed: for folders whose name says
    what is in them. Raises OSError when the folder cannot be renamed for any other reason.
    """
    with writing(path):
        _remove_abandoned(path)
        temporary = _beside(path)
        temporary.mkdir()
        at_work = os.open(temporary, os.O_RDONLY)
        try:
            _lock(at_work)
            yield temporary
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            os.close(at_work)
            if temporary.exists():
                shutil.rmtree(temporary)


def _remove_abandoned(path: Path) -> None:
    """Folders beside `path` in which processes that were killed had begun to make it."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.????????{UNFINISHED}"):
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # gone meanwhile, or no folder
            continue
        try:
            if _lock(opened) and time.time() - os.fstat(opened).st_mtime > ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(opened)


def _lock(opened: int) -> bool:
    """Hold a file until it is closed; False where another process does, or its file system has no locks."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _takes_no_files(folder: Path, error: OSError) -> bool:
    """Whether a file was to be made in a folder that is there, and could not be found in it, as in /proc."""
    made = error.filename if error.errno == errno.ENOENT and error.filename2 is None else None
    return made is not None and Path(os.fsdecode(made)).parent == folder


def _replaceable(path: Path) -> Path:
    """Where a file can take the place of `path`; not of a device, a pipe or a folder."""
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise CannotWrite(f"{path} is there, and no file; name another")
    return path


def _beside(path: Path) -> Path:
    """A name of one's own in the folder of `path`; it ends otherwise, so that no pattern of finished files fits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}{UNFINISHED}")
