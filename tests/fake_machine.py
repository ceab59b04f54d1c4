"""A machine made of files: those of /proc and of cgroups that a kernel would show, in a folder."""

from __future__ import annotations

from pathlib import Path

from expertd.daemon.pressure.linux import LinuxSource

MB = 1_000_000
GB = 1000 * MB
KIB = 1024
V1_UNLIMITED = 9223372036854771712

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:12 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """A folder with the files of /proc and of cgroups that a kernel would show."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = Clock()
        self.memory(16 * GB, 15 * GB)

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n" if isinstance(text, int) else text)

    def remove(self, path: str) -> None:
        (self.root / path.lstrip("/")).unlink()

    def memory(self, total: int, available: int, swap: int = 0, swap_free: int = 0) -> None:
        sizes = {"MemTotal": total, "MemFree": 1, "MemAvailable": available, "SwapTotal": swap, "SwapFree": swap_free}
        self.write("/proc/meminfo", "".join(f"{name}:  {size // KIB:>10} kB\n" for name, size in sizes.items()))

    def stalls(self, some: float, full: float, path: str = "/proc/pressure/memory") -> None:
        lines = (("some", some), ("full", full))
        self.write(path, "".join(f"{kind} avg10={x:.2f} avg60=0.00 avg300=0.00 total=5\n" for kind, x in lines))

    def membership(self, cgroup: str, mounts: str) -> None:
        self.write("/proc/self/cgroup", cgroup)
        self.write("/proc/self/mountinfo", mounts)

    def v1(self, folder: str, limit: int, used: int, cache: int = 0, failcnt: int = 0, kills: int = 0) -> None:
        """``cache`` is droppable; it is part of ``used``."""
        folder = f"/sys/fs/cgroup/memory{folder}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", used)
        stat = f"cache 7\nshmem 6\ntotal_shmem {300 * MB}\ninactive_file 5\nactive_file 4\n"
        stat += f"total_inactive_file {cache // 2}\ntotal_active_file {cache - cache // 2}\n"
        self.write(f"{folder}/memory.stat", stat)
        self.write(f"{folder}/memory.failcnt", failcnt)
        self.write(f"{folder}/memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")

    def v2(
        self, folder: str, limit: int | str, used: int, cache: int = 0, throttle: int | str = "max", **events: int
    ) -> None:
        """``cache`` is droppable; it is part of ``used``."""
        folder = f"/sys/fs/cgroup{folder}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{throttle}\n")
        self.write(f"{folder}/memory.current", used)
        self.write(f"{folder}/memory.stat", f"anon 9\nshmem {300 * MB}\ninactive_file {cache}\nactive_file 0\n")
        counts = {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 0} | events
        self.write(f"{folder}/memory.events.local", "".join(f"{name} {count}\n" for name, count in counts.items()))

    def source(self) -> LinuxSource:
        return LinuxSource(self.root, self.clock)

    def in_v1(self) -> Machine:
        """Put the process into the v1 cgroup /apps/expertd; nothing is limited yet."""
        self.membership("5:cpu:/\n4:memory:/apps/expertd\n0::/\n", V1_MOUNTS)
        for folder in ("", "/apps", "/apps/expertd"):
            self.v1(folder, V1_UNLIMITED, GB)
        (self.root / "sys/fs/cgroup/unified").mkdir()
        return self

    def in_v2(self) -> Machine:
        """Put the process into the v2 cgroup /apps/expertd; nothing is limited yet."""
        self.membership("0::/apps/expertd\n", V2_MOUNTS)
        for folder in ("/apps", "/apps/expertd"):
            self.v2(folder, "max", GB)
        return self
