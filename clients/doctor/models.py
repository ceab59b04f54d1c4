"""Checks of the folders in which models are: the hub's cache and LM Studio's."""

from __future__ import annotations

import os
from pathlib import Path

from expertd.clients.doctor.findings import Finding, note, ok
from expertd.clients.doctor.surroundings import Surroundings
from expertd.protocol.model_names import hub_cache
from expertd.protocol.shown import lm_studio_folders

LARGE = 32 << 20
"""Bytes of a file that is worth measuring."""


def lm_studio_folder(at: Surroundings) -> Path:
    """LM Studio's folder of models: the first that is there, else where it would be."""
    folders = [Path(folder) for folder in lm_studio_folders(str(at.user))]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def check_hub(at: Surroundings) -> Finding:
    """Where the hub's cache is."""
    folder, variable = hub_cache(at.environ, at.user)
    return _checked(folder, f" ({variable})" if variable else "", "models--*", "the hub's cache")


def check_lm_studio(at: Surroundings) -> Finding:
    """Where LM Studio's models are."""
    return _checked(lm_studio_folder(at), "", "*/*", "LM Studio's folder")


def _checked(folder: Path, origin: str, pattern: str, what: str) -> Finding:
    if not folder.exists():
        return ok(f"{what} is not there: {folder}{origin}")
    if not folder.is_dir():
        return note(f"{what}, {folder}{origin}, is no folder", "move the file away")
    if not os.access(folder, os.R_OK | os.X_OK):
        return note(f"{what}, {folder}{origin}, cannot be read", f"chmod u+rX {folder}")
    found = sum(path.is_dir() for path in folder.glob(pattern))
    return ok(f"{found} model{'' if found == 1 else 's'} in {folder}{origin}")


def known_models(at: Surroundings) -> list[Path]:
    """Folders of models that the daemon holds."""
    status = at.status()
    return [] if status is None else [Path(model.path) for model in status.models]


def weights(at: Surroundings) -> list[Path]:
    """Large files of models, those first that the daemon holds."""
    found: list[Path] = []
    for folder in known_models(at):
        found += sorted(folder.glob("*.safetensors"))
    found += sorted(at.home.packed.glob("*.packed"))
    found += sorted(hub_cache(at.environ, at.user)[0].glob("models--*/snapshots/*/*.safetensors"))
    found += sorted(lm_studio_folder(at).glob("*/*/*.safetensors"))
    return [path for path in found if _size(path) >= LARGE]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
