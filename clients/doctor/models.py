"""Checks of the folders in which models are: the hub's cache and LM Studio's."""

from __future__ import annotations

import os
from pathlib import Path

from expertd.clients.doctor.findings import Finding, note, ok
from expertd.clients.doctor.surroundings import Surroundings

LARGE = 32 << 20
"""Bytes of a file that is worth measuring."""


def hub_cache(at: Surroundings) -> tuple[Path, str]:
    """The hub's cache folder, as ``huggingface_hub`` finds it, and the variable that says so (empty for none)."""
    for name, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if at.environ.get(name):
            return Path(at.environ[name]).expanduser() / below, name
    return at.user / ".cache" / "huggingface" / "hub", ""


def lm_studio_folder(at: Surroundings) -> Path:
    """LM Studio's folder of models: where its pointer leads, else the one of the version that is installed."""
    pointer = at.user / ".lmstudio-home-pointer"
    try:
        return Path(pointer.read_text(encoding="utf-8").strip()) / "models"
    except (OSError, UnicodeDecodeError):
        pass  # most have none
    older = at.user / ".cache" / "lm-studio" / "models"
    newer = at.user / ".lmstudio" / "models"
    return older if older.is_dir() and not newer.is_dir() else newer


def check_hub(at: Surroundings) -> Finding:
    """Where the hub's cache is."""
    folder, variable = hub_cache(at)
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
    found += sorted(hub_cache(at)[0].glob("models--*/snapshots/*/*.safetensors"))
    found += sorted(lm_studio_folder(at).glob("*/*/*.safetensors"))
    return [path for path in found if _size(path) >= LARGE]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
