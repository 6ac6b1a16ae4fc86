"""Files and folders that appear whole or not at all."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from catalog.atomic import CannotWrite, atomic_file, atomic_folder, check_writable, writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("half way")


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert list(path.parent.glob("*.json")) == []
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.json"]


def test_a_file_that_fails_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as temporary:
        fail_half_way(temporary)
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass  # nothing was written
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_full_disk_is_named_with_what_was_to_be_written(tmp_path: Path, atomic: Callable) -> None:
    with pytest.raises(CannotWrite, match=r"/name cannot be written: .*No space left"), atomic(tmp_path / "name"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_folder_that_is_gone_is_named_with_what_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file"
    with pytest.raises(CannotWrite, match=r"gone/file cannot be written"), writing(path):
        path.write_text("")
    with pytest.raises(FileNotFoundError), writing(tmp_path / "file"):
        path.read_text()


def test_the_last_of_two_writers_of_a_file_wins(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_a_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("whole")
        assert not path.exists()
    assert (path / "file").read_text() == "whole"
    assert path.stat().st_mode == path.parent.stat().st_mode
    assert names(path.parent) == ["folder"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(tmp_path / "folder") as temporary:
        fail_half_way(temporary / "file")
    assert names(tmp_path) == []


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("ours")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("theirs")
    assert (tmp_path / "folder" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["folder"]


def test_what_killed_processes_left_is_removed_once_nobody_works_on_it(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from catalog.atomic import atomic_folder
with atomic_folder(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("a half")
    os.utime(temporary, (0, 0))
    print(temporary.name, flush=True)
    signal.pause()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "folder")]
    killed, working = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        left, kept = (process.stdout.readline().strip() for process in (killed, working))  # type: ignore[union-attr]
        killed.kill()
        killed.wait()
        (others := tmp_path / ".folder.20261128").mkdir()
        (recent := tmp_path / ".folder.01234567.unfinished").mkdir()
        os.utime(others, (0, 0))
        with atomic_folder(tmp_path / "folder"):
            there = set(names(tmp_path))
        assert there & {left, kept, others.name, recent.name} == {kept, others.name, recent.name}
    finally:
        working.kill()
        working.communicate()
        killed.communicate()


@pytest.mark.parametrize("path", ["folder", "folder/in/a/file"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").write_text("a file")
    message = f"{path} cannot be written: .*Not a directory"
    with pytest.raises(CannotWrite, match=message), atomic_folder(tmp_path / path):
        pass
    assert names(tmp_path) == ["folder"]


def test_a_device_stays_one_and_a_link_leads_where_it_did(tmp_path: Path) -> None:
    pipe, link, behind = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "behind.json"
    os.mkfifo(pipe)
    for write in (check_writable, lambda path: atomic_file(path).__enter__()):
        with pytest.raises(CannotWrite, match="pipe is there, and no file"):
            write(pipe)
    link.symlink_to(behind)
    with atomic_file(link) as temporary:
        temporary.write_text("{}")
    assert link.is_symlink()
    assert behind.read_text() == "{}"


def test_where_there_are_no_files_is_named() -> None:
    with pytest.raises(CannotWrite, match=r"/proc/metrics\.json cannot be written"):
        check_writable(Path("/proc/metrics.json"))
