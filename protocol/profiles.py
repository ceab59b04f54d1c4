"""Profiles: which experts a kind of work uses, counted once and kept by name, so that they can be there beforehand.

A profile is one JSON file in the home.  It counts uses by layer and expert; it fits every model of the same shape, so
that it stays good when a model's files are copied or quantized anew.  Which model uses which profile from now on is one
more file beside them, which daemons read when a model comes.  How profiles are made is ``expertd.clients.profiles``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from expertd.protocol.errors import ProfileInvalid, ProfileNotFound
from expertd.protocol.paths import Home

FORMAT = 1
MOST = 1 << 53
LATEST = 1e11
"""Beyond these counts are no counts, and seconds since 1970 no date."""
LARGEST = 64 << 20
"""Bytes of a file that may be a profile."""
EVERYWHERE = 0.5
"""An expert that at least so large a part of the prompts used is in use everywhere."""

Block = tuple[int, int]

_REMOVE = "remove it with: expertd profile remove"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Which experts were used.

    Attributes:
        model: the one that it was made with, for a person.
        made_at: in seconds since 1970.
        source: what it was made of, for a person: ``40 prompts of code.txt``.
        tokens: that were counted; 0: not known.
        prompts: sequences, or prompts, that were counted.
        experts: of each MoE layer.
        uses: of each MoE layer and each of its experts, how often it was chosen.
        seen: the same, in how many of the ``prompts`` it was chosen at all.
    """

    format: int = FORMAT
    model: str
    made_at: float
    source: str
    tokens: int
    prompts: int
    experts: list[int]
    uses: list[list[int]]
    seen: list[list[int]]

    @property
    def blocks(self) -> list[Block]:
        """The blocks that were used, the most used first; what is as much used is spread over the layers."""
        found = [
            (-count, expert, layer)
            for layer, counts in enumerate(self.uses)
            for expert, count in enumerate(counts)
            if count
        ]
        return [(layer, expert) for _, expert, layer in sorted(found)]

    @property
    def everywhere(self) -> list[Block]:
        """The blocks that at least half of the prompts used, those first that the most did."""
        found = [
            (-count, -self.uses[layer][expert], expert, layer)
            for layer, counts in enumerate(self.seen)
            for expert, count in enumerate(counts)
            if count and count >= EVERYWHERE * self.prompts
        ]
        return [(layer, expert) for _, _, expert, layer in sorted(found)]

    def misfit(self, experts: Sequence[int]) -> str | None:
        """Why it is none for a model whose MoE layers have so many ``experts``, as a part of a sentence; or None."""
        if list(experts) == self.experts:
            return None
        return f"it is for {_shape(self.experts)}, and the model has {_shape(experts)}"


def _shape(experts: Sequence[int]) -> str:
    return f"{len(experts)} MoE layers of {'/'.join(str(count) for count in sorted(set(experts)))} experts"


def profile_path(home: Home, name: str) -> Path:
    """Where the profile called ``name`` is, or would be.

    Raises:
        ProfileInvalid: nothing can be called so.
    """
    if not _NAME.fullmatch(name):
        raise ProfileInvalid(
            f"{name[:80]!r} cannot be a profile's name; use up to 64 letters, digits, dots, dashes and underscores"
        )
    return home.profiles / f"{name}.json"


def profile_names(home: Home) -> list[str]:
    """The names of all profiles, in order."""
    try:
        return sorted(path.stem for path in home.profiles.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ProfileInvalid(f"{home.profiles} cannot be read ({error.strerror})") from error


def read_profile(home: Home, name: str) -> Profile:
    """The profile called ``name``.

    Raises:
        ProfileNotFound: there is none.
        ProfileInvalid: its file cannot be used; or nothing can be called so.
    """
    path = profile_path(home, name)
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    except FileNotFoundError as error:
        there = ", ".join(profile_names(home)) or "none yet; make one with: expertd profile record NAME MODEL"
        raise ProfileNotFound(f"there is no profile {name!r}; there are: {there}") from error
    except OSError as error:
        raise ProfileInvalid(f"the profile {path} cannot be read ({error.strerror})") from error
    try:
        found = msgspec.json.decode(data, type=Profile)
    except msgspec.DecodeError as error:
        raise ProfileInvalid(f"{path} is no profile ({error}); {_REMOVE} {name}") from error
    if found.format > FORMAT:
        raise ProfileInvalid(f"the profile {path} has format {found.format}; this expertd reads {FORMAT}: update it")
    shapes = [[len(row) for row in rows] for rows in (found.uses, found.seen)]
    numbers = [count for rows in (found.uses, found.seen) for row in rows for count in row]
    believable = 0 <= min(numbers, default=-1) <= max(numbers, default=0) < MOST and 0 <= found.made_at < LATEST
    if shapes != [found.experts] * 2 or 0 in found.experts or not believable:
        raise ProfileInvalid(f"{path} is damaged; {_REMOVE} {name}")
    return found


def write_profile(home: Home, name: str, profile: Profile, *, replace: bool = False) -> Path:
    """Keep ``profile`` under ``name``; returns its file.

    Raises:
        ProfileInvalid: there is one of that name (unless ``replace``), nothing can be called so, or the home cannot be
            written.
    """
    path = profile_path(home, name)
    if path.exists() and not replace:
        raise ProfileInvalid(f"there is a profile {name!r} already; give --replace, or choose another name")
    _write(path, msgspec.json.encode(profile))
    return path


def remove_profile(home: Home, name: str) -> list[str]:
    """Remove a profile; returns the folders of the models that used it, which use none from now on.

    Raises:
        ProfileNotFound: there is none.
        ProfileInvalid: it cannot be removed.
    """
    path = profile_path(home, name)
    if not path.exists():
        read_profile(home, name)  # says what there is
    try:
        path.unlink()
    except OSError as error:
        raise ProfileInvalid(f"the profile {path} cannot be removed ({error.strerror})") from error
    users = [folder for folder, used in profiles_in_use(home).items() if used == name]
    for folder in users:
        use_profile(home, folder, None)
    return users


def profiles_in_use(home: Home) -> dict[str, str]:
    """The names of the profiles that models use, by the models' folders; what cannot be read says nothing."""
    try:
        return msgspec.json.decode(home.profiles_in_use.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def use_profile(home: Home, folder: str, name: str | None) -> None:
    """From now on the model in ``folder`` uses that profile; None: none.

    Raises:
        ProfileInvalid: the home cannot be written.
    """
    used = profiles_in_use(home)
    if name is None:
        used.pop(folder, None)
    else:
        used[folder] = name
    _write(home.profiles_in_use, msgspec.json.encode(used))


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.write_bytes(msgspec.json.format(data, indent=0) if len(data) < 4096 else data)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise ProfileInvalid(f"{path} cannot be written ({error.strerror}); make room, or set EXPERTD_HOME") from error
