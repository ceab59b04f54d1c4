"""What may happen to a checkpoint's file, and undone again: size, time and inode are afterwards what they were."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KINDS = (
    "truncated",
    "replaced_by_other",
    "replaced_by_copy",
    "replaced_by_garbage",
    "touched",
    "unreadable",
    "missing",
)
Undo = Callable[[], None]


@dataclass(frozen=True)
class Checkpoint:
    """The one file of a checkpoint, as it is when nothing is wrong with it, and another checkpoint's of equal size."""

    path: Path
    other: Path

    def damage(self, kind: str, chance: random.Random) -> Undo:
        """Do one of ``KINDS``; what is returned undoes it."""
        before = self.path.stat()

        def times_back() -> None:
            os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))

        match kind:
            case "truncated":
                kept = chance.randrange(before.st_size)
                with self.path.open("r+b") as file:
                    file.seek(kept)
                    tail = file.read()
                    file.truncate(kept)

                def undo() -> None:
                    with self.path.open("r+b") as file:
                        file.seek(kept)
                        file.write(tail)
                    times_back()

                return undo
            case "touched":
                os.utime(self.path)
                return times_back
            case "unreadable":
                self.path.chmod(0)
                return lambda: self.path.chmod(before.st_mode)
            case "missing":
                aside = self.path.rename(self.path.with_suffix(".aside"))
                return lambda: _put(aside, self.path)
        aside = self.path.with_suffix(".aside")
        new = self.path.with_suffix(".new")
        match kind:
            case "replaced_by_other":
                shutil.copyfile(self.other, new)
            case "replaced_by_copy":
                shutil.copyfile(self.path, new)
            case _:
                new.write_bytes(chance.randbytes(chance.choice((0, 100, before.st_size))))
        if chance.random() < 0.5:  # only the inode tells then
            os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        os.link(self.path, aside)
        new.rename(self.path)
        return lambda: _put(aside, self.path)


def _put(aside: Path, path: Path) -> None:
    """The original file back in its place, whatever is there now."""
    aside.rename(path)
