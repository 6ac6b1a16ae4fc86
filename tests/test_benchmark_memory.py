"""The memory that benchmarks report."""

from types import SimpleNamespace

import pytest

from benchmarks import sides
from benchmarks.sides import GIB, MemoryWatch


@pytest.mark.skipif(sides.ON_NVIDIA, reason="there, device memory is measured")
def test_what_changes_while_page_tables_are_walked_is_not_taken_for_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    private = [100 * 2**20]
    shared = 50 * 2**20

    def walked(pid: int, frees: int = 0) -> int:
        found = private[0] + shared
        private[0] -= frees
        return found

    alone = SimpleNamespace(pid=1, children=lambda recursive: [])
    monkeypatch.setattr(sides, "psutil", SimpleNamespace(Process=lambda: alone))
    monkeypatch.setattr(sides, "_private_bytes", lambda pid: private[0])
    monkeypatch.setattr(sides, "_proportional_bytes", walked)
    watch = MemoryWatch()
    assert watch.measure() == (100 * 2**20 + shared) / GIB
    private[0] = 500 * 2**20
    monkeypatch.setattr(sides, "_proportional_bytes", lambda pid: walked(pid, frees=400 * 2**20))
    watch.measure()
    private[0] = 500 * 2**20
    watch._glance()
    assert watch.peak_gib == (500 * 2**20 + shared) / GIB
