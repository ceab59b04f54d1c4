"""What the device gives: the C program beside this file, compiled when it is needed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("reader.c")
THREADS = 4


class Yardstick:
    """Reads records of a packed store with O_DIRECT on ``THREADS`` threads."""

    def __init__(self, folder: Path, store: Path, record_bytes: int, part_bytes: int) -> None:
        """Compile it into ``folder``.

        Raises:
            RuntimeError: there is no C compiler, or it does not take the source.
        """
        compiler = shutil.which("cc")
        if compiler is None:
            raise RuntimeError("there is no C compiler (cc)")
        program = folder / "reader"
        done = subprocess.run(
            [compiler, "-O2", "-pthread", "-o", str(program), str(SOURCE)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} does not compile {SOURCE.name}: {done.stderr.strip()}")
        self._command = [str(program), str(store), str(record_bytes), str(part_bytes), str(THREADS)]

    def read(self, offsets: Sequence[int], large: bool = False) -> float:
        """Seconds that it takes to read the records at ``offsets``; ``large``: into large pages.

        Raises:
            RuntimeError: it cannot.
        """
        command = [*self._command, str(int(large))]
        done = subprocess.run(command, input="\n".join(map(str, offsets)), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the C reader failed: {done.stderr.strip() or done.returncode}")
        return float(done.stdout)
