"""Sizes and models' names as people read them.

Imports nothing that takes time, because ``expertd status`` waits for it (``expertd.clients.entry``).  Sizes are read in
``expertd.protocol.sizes``, models found by their names in ``expertd.protocol.model_names``.
"""

from __future__ import annotations

import os

LM_STUDIO_FOLDERS = ("~/.lmstudio/models", "~/.cache/lm-studio/models")


def show_size(size_bytes: float) -> str:
    """``size_bytes`` in the decimal unit that leaves one to three digits: ``1.3 GB``."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def shown_name(folder: str | os.PathLike[str]) -> str:
    """What to call the model in ``folder`` (an absolute path): its hub id where the path tells it, else the last part.

    Touches nothing, so it does for a folder that is gone, too.
    """
    id, _ = snapshot_of(folder)
    if id:
        return id
    parent, _, name = os.fspath(folder).rpartition("/")
    models, _, publisher = parent.rpartition("/")
    studio = models in map(os.path.expanduser, LM_STUDIO_FOLDERS)
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
