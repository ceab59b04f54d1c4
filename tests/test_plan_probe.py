"""The short measurement of a disk: that it really reads, with the daemon's threads, and what failing looks like."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from expertd.clients.planning.shape import read_shape
from expertd.daemon.probe import FEWEST, PIECE, probe, rate_of
from expertd.protocol.errors import FileChanged, ReadFailed


class Counting:
    """``os.preadv`` that counts what comes, and how many reads are under way at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.most = self.bytes = 0
        self.together = threading.Event()

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self._now > 1:
                self.together.set()
        self.together.wait(0.01)  # so that two meet, if there are two
        size = os.preadv(descriptor, buffers, offset)
        with self._lock:
            self._now -= 1
            self.bytes += size
        return size


@pytest.mark.parametrize("form", ["stacked", "per_expert", "sharded"])
def test_blocks_are_read_as_the_daemon_reads_them(
    checkpoints: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.daemon.probe.SECONDS", 0.0)
    shape = read_shape(checkpoints[form].resolve())
    block = shape.manifest.layers[0].block_bytes
    alone = Counting()
    times = probe(shape.manifest, None, (1,), alone)
    assert list(times) == [1] and times[1] > 0
    assert alone.most == 1 and alone.bytes >= FEWEST * block
    several = Counting()
    assert list(probe(shape.manifest, None, (1, 4), several)) == [1, 4]
    assert several.most > 1 and several.bytes >= FEWEST * 5 * block


def test_a_disk_that_fails_is_told(checkpoints: dict[str, Path]) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ReadFailed, match="Input/output error"):
        probe(read_shape(checkpoints["stacked"].resolve()).manifest, None, (1, 4), broken)


def test_a_file_that_changed_is_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoints["stacked"] / name).read_bytes())
    shape = read_shape(tmp_path)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(FileChanged):
        probe(shape.manifest, None, (1,))


def test_a_file_is_read_all_over(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(5 * PIECE + 7))
    offsets: set[int] = set()

    def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        offsets.add(offset)
        return os.preadv(descriptor, buffers, offset)

    rate, seconds = rate_of(path, 0.2, noted)
    assert rate > 0 and seconds > 0
    assert offsets == {place * PIECE for place in range(5)}


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        rate_of(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(OSError, match="too short"):
        rate_of(tmp_path / "short")
