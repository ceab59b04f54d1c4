"""Checks of the machine: system, MLX, memory, shared memory, disk, limits."""

from __future__ import annotations

import re

from expertd.clients.doctor.findings import Finding, note, ok, problem
from expertd.clients.doctor.models import weights
from expertd.clients.doctor.surroundings import Surroundings
from expertd.protocol.sizes import show_size

OLDEST_PYTHON = (3, 11)
SLOW = 1_000_000_000
"""A disk below so many bytes a second makes every miss felt."""
FEW_FILES, FEWEST_FILES = 1024, 256
"""Sessions take a few descriptors each, and every file of a model one."""


def check_platform(at: Surroundings) -> Finding:
    """macOS on Apple silicon or Linux, and a Python that is new enough."""
    python = ".".join(map(str, at.python))
    here = f"{at.system} on {at.processor}, Python {python}"
    if at.python < OLDEST_PYTHON:
        return problem(f"{here}, which is too old", "install Python 3.11 or newer, and expertd with it")
    if at.mac and at.processor != "arm64":
        return problem(
            f"{here}: MLX needs Apple silicon",
            "use a Mac with Apple silicon; if this is one, install a Python for arm64, not for x86_64",
        )
    if not at.mac and at.platform != "linux":
        return problem(f"{here}, where expertd does not run", "use macOS on Apple silicon, or Linux")
    return ok(here)


def check_mlx(at: Surroundings) -> Finding:
    """A version of MLX, and of mlx-lm, that expertd takes."""
    told = []
    for package in ("mlx", "mlx-lm"):
        wanted, version = at.requirement(package)
        if version is None:
            return problem(f"{package} is not installed", f"pip install '{package}{wanted}'")
        if not satisfies(version, wanted):
            return problem(f"{package} {version} is none that expertd takes ({wanted})",
                           f"pip install '{package}{wanted}'")  # fmt: skip
        told.append(f"{package} {version}")
    return ok(" and ".join(told))


def satisfies(version: str, wanted: str) -> bool:
    """Whether ``version`` is in a range like ``>=1.2,<2`` (``>=``, ``<=``, ``>``, ``<`` and ``==`` of numbers)."""
    numbers = _numbers(version)
    for one in filter(None, map(str.strip, wanted.split(","))):
        found = re.fullmatch(r"(>=|<=|==|>|<)\s*([\d.]+)", one)
        if found is None:
            continue
        limit = _numbers(found[2])
        if not {
            ">=": numbers >= limit, "<=": numbers <= limit, "==": numbers == limit,
            ">": numbers > limit, "<": numbers < limit,
        }[found[1]]:  # fmt: skip
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """Its numbers, up to four, zeros behind; what is not a number ends them."""
    parts = re.match(r"[\d.]*", version)
    found = [int(part) for part in (parts[0] if parts else "").split(".") if part]
    return tuple([*found, 0, 0, 0, 0][:4])


def check_alias(at: Surroundings) -> Finding:
    """Whether MLX computes out of shared pages."""
    why = at.alias()
    if not why:
        return ok("MLX computes out of shared pages, without a copy")
    return note(
        f"MLX cannot compute out of shared pages here ({why}), so each process copies the experts that it uses",
        "report this with the versions above; until then every process needs the memory of its experts once more",
    )


def check_budget(at: Surroundings) -> Finding:
    """What the daemon may take, and why."""
    found = at.budget()
    if found.size == found.default:
        return ok(f"{show_size(found.default)} for experts, by default", found.why)
    text = f"{show_size(found.size)} for experts as set; the default would be {show_size(found.default)}"
    if found.size > 2 * found.default:
        return note(text, "less leaves the system and its page cache more; see: expertd plan MODEL", found.why)
    return ok(text, found.why)


def check_pressure(at: Surroundings) -> Finding:
    """Whether the machine is short of memory."""
    level, figure = at.pressure()
    if level == "normal":
        return ok(f"memory pressure is normal: {figure}")
    return note(f"memory pressure is {level}: {figure}", "close what you do not need; the daemon gives memory back")


def check_shm(at: Surroundings) -> Finding:
    """Whether shared memory can hold the budget."""
    if at.shm is None:
        return ok("shared memory has no limit of its own here")
    space, budget = at.space(at.shm), at.budget().size
    text = f"{at.shm} has {show_size(space.total)}, {show_size(space.free)} of it free"
    status = at.status()
    held = 0 if status is None else status.used_bytes
    if space.free + held >= budget:
        return ok(text)
    size = -(-budget // 1_000_000_000) + 1
    return problem(
        f"{text}, and the budget is {show_size(budget)}",
        f"mount -o remount,size={size}G {at.shm} (Docker: --shm-size {size}g), or give less: expertd budget SIZE",
    )


def check_disk(at: Surroundings) -> Finding:
    """How fast experts are read."""
    found = at.speed(weights(at))
    if found is None:
        return note("the disk was not measured: there is no model yet that could be read")
    text = f"{show_size(found.rate)}/s, a megabyte in {1e3 * found.read_s:.1f} ms ({found.path})"
    if found.rate >= SLOW:
        return ok(text)
    return note(
        f"{text}: that is slow, and every miss waits for it",
        "keep models on the internal SSD, pack them (expertd pack MODEL), or give them more memory",
    )


def check_files(at: Surroundings) -> Finding:
    """Whether the daemon may open enough files."""
    soft, hard = at.open_files
    text = f"{_limit(soft)} at once, for the daemon {_limit(hard)}"
    if 0 <= hard < FEWEST_FILES:
        return problem(text, f"raise the hard limit to {FEW_FILES} or more: ulimit -Hn {FEW_FILES}")
    if 0 <= hard < FEW_FILES:
        return note(text, f"for many models and sessions raise the hard limit: ulimit -Hn {FEW_FILES}")
    return ok(text)


def _limit(number: int) -> str:
    return "any number" if number < 0 or number >= 1 << 62 else f"{number:,}"
