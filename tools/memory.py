"""What a process's memory costs the machine, from Linux's ``smaps_rollup`` (proc(5)).

Pss divides each page by the number of processes that map it, so the sum over all processes is what is really taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes: ``all``; this process's share of ``shared`` memory; what is ``anonymous``, so its own."""

    all: int
    shared: int
    anonymous: int

    @property
    def private(self) -> int:
        """All but shared memory."""
        return self.all - self.shared


def memory_of(pid: int) -> Memory:
    """The memory of one process."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name] = int(value) * 1024
    return Memory(fields["Pss:"], fields["Pss_Shmem:"], fields["Pss_Anon:"])
