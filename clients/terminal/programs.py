"""Which programs use the cache: a name that a person knows for a process id.

A name helps to recognize a program and is no more than that: a process of somebody else, or one that has ended, has
none.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # see terminal.fit
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CLI_MODULE = "expertd.clients.cli"
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
_PS_S = 2.0


def program(arguments: Sequence[str]) -> str:
    """What people call the program with these arguments (``argv``); empty if they are.

    A Python program is called by its script or module, expertd's own by its command (a gateway's worker by the
    gateway's), any other by its file.
    """
    if not arguments:
        return ""
    name, rest = _last(arguments[0]), list(arguments[1:])
    if name.lower().removesuffix("w").rstrip(".0123456789") == "python":
        name, rest = _of_python(name, rest)
    if name in ("expertd", CLI_MODULE):
        command = next((word for word in rest if not word.startswith("-")), "")
        return f"expertd {'serve' if command == 'worker' else command}".rstrip()
    return name


def _of_python(name: str, rest: list[str]) -> tuple[str, list[str]]:
    while rest:
        word = rest.pop(0)
        if word == "-m" and rest:
            return rest[0], rest[1:]
        if word == "-c":
            return f"{name} -c", []
        if word in _WITH_VALUE:
            rest = rest[1:]
        elif not word.startswith("-"):
            return _last(word), rest
    return name, []


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def programs(pids: Iterable[int]) -> dict[int, str]:
    """The names of processes; those that have none are left out."""
    wanted = sorted(set(pids))
    if not wanted:
        return {}
    arguments = _from_proc(wanted) if sys.platform == "linux" else _from_ps(wanted)
    return {pid: name for pid, words in arguments.items() if (name := program(words))}


def _from_proc(pids: Sequence[int]) -> dict[int, list[str]]:
    found = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123, see terminal.fit
                line = file.read()
        except OSError:
            continue
        found[pid] = line.decode(errors="replace").rstrip("\0").split("\0")
    return found


def _from_ps(pids: Sequence[int]) -> dict[int, list[str]]:
    """As macOS tells it: one line for each process, its arguments joined by spaces."""
    import subprocess

    command = ["ps", "-ww", "-o", "pid=,command=", "-p", ",".join(map(str, pids))]
    try:
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PS_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {int(words[0]): words[1:] for line in said.stdout.splitlines() if (words := line.split())}
