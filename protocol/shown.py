"""Sizes and models' names as people read them.

Imports nothing that takes time, because ``expertd status`` waits for it (``expertd.clients.entry``).  Sizes are read in
``expertd.protocol.sizes``, models found by their names in ``expertd.protocol.model_names``.
"""

from __future__ import annotations

import os


def show_size(size_bytes: float) -> str:
    """``size_bytes`` in the decimal unit that leaves one to three digits: ``1.3 GB``."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def lm_studio_folders(user: str = "~") -> tuple[str, ...]:
    """Where LM Studio has its models, for who has the folder ``user``: where its pointer leads, then by default."""
    user = os.path.expanduser(user)  # noqa: PTH111
    found = (f"{user}/.lmstudio/models", f"{user}/.cache/lm-studio/models")
    try:
        with open(f"{user}/.lmstudio-home-pointer", encoding="utf-8") as pointer:  # noqa: PTH123
            moved = pointer.read().strip()
    except (OSError, UnicodeDecodeError):
        return found  # most have none
    return tuple(dict.fromkeys((f"{moved.rstrip('/')}/models", *found))) if moved.startswith("/") else found


def shown_name(folder: str | os.PathLike[str]) -> str:
    """What to call the model in ``folder`` (an absolute path): its hub id where the path tells it, else the last part.

    Does not look at the folder, so it may be gone.
    """
    id, _ = snapshot_of(folder)
    if id:
        return id
    parent, _, name = os.fspath(folder).rpartition("/")
    models, _, publisher = parent.rpartition("/")
    studio = models in lm_studio_folders()
    return f"{publisher}/{name}" if studio else name


def shown_path(path: str) -> str:
    """A model's folder for people: its hub id in place of a path that ends in a commit, else the path as it is."""
    name = shown_name(path)
    return name if "/" in name else path


def snapshot_of(folder: str | os.PathLike[str]) -> tuple[str, str]:
    """The hub id and the revision of a snapshot in a hub cache, by its path; both empty if it is none."""
    above, _, revision = os.fspath(folder).rpartition("/")
    repository, _, snapshots = above.rpartition("/")
    id = id_of(repository.rpartition("/")[2]) if snapshots == "snapshots" else ""
    return (id, revision) if id else ("", "")


def id_of(name: str) -> str:
    """The hub id of a folder of the hub's cache, by its name; empty if it is none of a model."""
    return name.removeprefix("models--").replace("--", "/") if name.startswith("models--") else ""
