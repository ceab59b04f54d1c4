"""What a user calls a model, turned into the folder that holds it; and the other way round.

A model is called by, in this order:

1. the path of its folder;
2. its id on the hub (``mlx-community/Qwen3-30B-A3B-4bit``, with ``@REVISION`` where several are here), if the hub's
   cache on this machine has it, or LM Studio, or one of the user's own folders (``model_folders``) does;
3. its name alone, if only one model on this machine has it.

Nothing here asks the network, and nothing is downloaded: that is ``expertd pull`` (``expertd.clients.hub``).  What is
*in* a folder is judged by who loads it (``expertd.worker.manifest``) or lists it (``expertd.clients.hub.survey``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from expertd.protocol.checkpoint import missing_files
from expertd.protocol.errors import ModelAmbiguous, ModelIncomplete, ModelNotHere, NotACheckpoint
from expertd.protocol.paths import Home, expanded
from expertd.protocol.shown import id_of, lm_studio_folders, shown_name, shown_path, snapshot_of

__all__ = [
    "KnownModel", "check_complete", "find_model", "hub_cache", "hub_id", "known_models", "models_in", "shown_name",
    "shown_path",
]  # fmt: skip

HUB_CACHE = "hub cache"
LM_STUDIO = "LM Studio"

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<id>(?:{_WORD}/)?{_WORD})(?:@(?P<revision>[^@\s]+))?")
_MOST_NAMED = 3


@dataclass(frozen=True)
class KnownModel:
    """A folder that may hold a model, the name that finds it, and the ``place`` where it was found."""

    name: str
    folder: Path
    place: str


def find_model(name: str | Path, home: Home | None = None) -> Path:
    """The folder of the model that is called ``name``, with all symbolic links of the folder itself followed.

    Args:
        home: whose ``model_folders`` to look in; by default the current one.

    Raises:
        NotACheckpoint: it is written as a path, and there is nothing.
        PathInvalid: see ``expanded``.
        ModelNotHere: it is no folder, and no model on this machine is called so; says how to get it.
        ModelIncomplete: files of it are missing, as after a download that was broken off.
        ModelAmbiguous: several are called so.
        ConfigInvalid, HomeError: the settings, which say where to look, cannot be used.
    """
    text = str(name)
    path = expanded(text)
    if text and path.exists():
        folder = path.resolve()
    elif isinstance(name, Path) or _is_path(text):
        raise NotACheckpoint(f"{path} does not exist; {_instead_of_path(path)}")
    else:
        folder = _by_name(text, home or Home.current()).resolve()
    check_complete(folder)
    return folder


def check_complete(folder: Path) -> None:
    """Refuse a model whose download was broken off.  A folder that is no model at all is left to who loads it.

    Raises:
        ModelIncomplete: files are missing; names some.
    """
    id, _ = snapshot_of(folder)
    if not folder.is_dir() or not (id or any(folder.glob("model*.safetensors"))):
        return
    missing = missing_files(folder)
    if not id and missing == ["config.json"]:
        return  # whoever loads it says it better
    if missing:
        count = f"{len(missing)} of its files are missing" if len(missing) > 1 else "a file is missing"
        named = ", ".join(missing[:_MOST_NAMED]) + (", ..." if len(missing) > _MOST_NAMED else "")
        way = f"get the rest with: expertd pull {_written(folder)}" if id else "copy it once more"
        raise ModelIncomplete(f"{_written(folder)} is here, but {count} ({named}); {way}")


def hub_id(text: str) -> tuple[str, str | None] | None:
    """``(id, revision)`` if ``text`` can be a model's id on the hub, as ``org/name`` or ``org/name@revision``."""
    match = _HUB_ID.fullmatch(text)
    if match is None or "--" in match["id"] or ".." in match["id"]:
        return None
    return match["id"], match["revision"]


def known_models(home: Home) -> Iterator[KnownModel]:
    """Every model that can be called by its name, place by place; the first of a name is the one that it finds.

    Raises:
        ConfigInvalid, HomeError: the settings cannot be used.
    """
    from expertd.protocol.config import read_config  # late, because whoever only shows a name needs none of it

    yield from _in_hub_cache()
    for place in lm_studio_folders():
        yield from models_in(Path(place), LM_STUDIO, publishers=True)
    for folder in read_config(home).model_folders.value:
        yield from models_in(folder)


def models_in(place: Path, told: str = "", *, publishers: bool = False) -> Iterator[KnownModel]:
    """The models in the folders of ``place``, and in the folders of those (PUBLISHER/NAME); or ``place`` itself.

    Args:
        told: what to call the place.
        publishers: whether the first level is publishers only, so that it is part of every name.
    """
    if _holds_model(place):
        yield KnownModel(shown_name(place), place, told or str(place.parent))
        return
    told = told or str(place)
    for folder in _folders(place):
        if _holds_model(folder) and not publishers:
            yield KnownModel(folder.name, folder, told)
        else:
            below = (inner for inner in _folders(folder) if _holds_model(inner))
            yield from (KnownModel(f"{folder.name}/{inner.name}", inner, told) for inner in below)


# -- by name -----------------------------------------------------------------------------------------------------------


def _by_name(text: str, home: Home) -> Path:
    parsed = hub_id(text)
    if parsed is not None:
        found = _snapshot(*parsed)
        if found is not None:
            return found
    known = list(known_models(home))
    for same in (lambda model: model.name == text, lambda model: model.name.rpartition("/")[2] == text):
        found = _the_one(text, list(filter(same, known)))
        if found is not None:
            return found
    raise ModelNotHere(_not_here(text, [model.name for model in known]))


def _the_one(text: str, found: list[KnownModel]) -> Path | None:
    """The first, unless others are called differently: two copies of one model are as good as each other."""
    names = sorted({model.name for model in found})
    if len(names) > 1:
        raise ModelAmbiguous(f"several models here are called {text}: {', '.join(names)}; give one of these names")
    return found[0].folder if found else None


def _not_here(text: str, names: list[str]) -> str:
    near = _near(text, names) or next((name for name in names if _near(text, [name.rpartition("/")[2]])), "")
    meant = f" (did you mean {near}?)" if near else ""
    parent = Path(text).parent
    if hub_id(text) is None:
        return f"{text!r} is neither a folder nor a model on this machine{meant}; 'expertd models' lists those"
    if "/" in text and "@" not in text and parent.is_dir():
        return f"{text} does not exist, and no model on this machine is called so; {_instead_of_path(Path(text))}"
    if "/" not in text:
        return (
            f"{text} is neither a folder nor a model on this machine{meant}; give a folder, or a name that "
            "'expertd models' lists"
        )
    return f"{text} is not on this machine{meant}; download it with: expertd pull {text}"


def _is_path(text: str) -> bool:
    """Whether ``text`` can only be meant as a path."""
    return text.startswith((os.sep, ".", "~")) or text.endswith(os.sep) or text.count(os.sep) > 1


def _instead_of_path(path: Path) -> str:
    """What to do about a path that does not exist."""
    there = path.parent
    while not there.exists():
        path, there = there, there.parent
    near = _near(path.name, [folder.name for folder in _folders(there)])
    return f"did you mean {there / near}?" if near else "give the folder of an mlx-lm checkpoint, or a model's name"


def _near(word: str, words: Sequence[str]) -> str:
    """The one of ``words`` that may be meant; empty if none is near."""
    import difflib  # late, because a name that is right needs none of it

    return next(iter(difflib.get_close_matches(word, words, n=1)), "")


# -- places ------------------------------------------------------------------------------------------------------------


def _in_hub_cache() -> Iterator[KnownModel]:
    for repo in _folders(_hub_cache()):
        id, ambiguous = id_of(repo.name), False
        if not id:
            continue
        try:
            found = _snapshot(id, None)
        except ModelAmbiguous:
            found, ambiguous = None, True
        if found is not None:
            yield KnownModel(id, found, HUB_CACHE)
        elif ambiguous:
            for snapshot in _folders(repo / "snapshots"):
                yield KnownModel(f"{id}@{snapshot.name}", snapshot, HUB_CACHE)


def _hub_cache() -> Path:
    """Where the hub's own library keeps what it downloads (HF_HUB_CACHE, HF_HOME); the layout below it is documented.

    Only its constants are imported, which takes 40 ms; what reads the cache there takes half a second to import.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_cache(environment: Mapping[str, str], user: Path) -> tuple[Path, str]:
    """The hub's cache as its library finds it in another ``environment`` than this process's, in full.

    Returns:
        The folder, and the variable that names it; empty if none does.
    """
    below = {"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    for variable, rest in below.items():
        if said := environment.get(variable):
            text = Template(said).safe_substitute(environment)
            inside = text == "~" or text.startswith("~/")
            return (user / text[2:] if inside else Path(text).absolute()) / rest, variable
    return user / ".cache" / "huggingface" / "hub", ""


def _snapshot(id: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache of one version of a model; None if it has none.

    Without a revision it is what ``main`` was at the last download, or else the only version that is there.
    """
    repo = _hub_cache() / ("models--" + id.replace("/", "--"))
    try:
        named = (repo / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    snapshots = _folders(repo / "snapshots")
    for folder in snapshots:
        if folder.name == named:
            return folder
    if revision is not None:
        snapshots = [folder for folder in snapshots if folder.name.startswith(revision)]
    if len(snapshots) > 1:
        names = ", ".join(f"{id}@{folder.name[:12]}" for folder in snapshots[:_MOST_NAMED])
        raise ModelAmbiguous(f"several versions of {id} are here, and none is 'main'; give one of them: {names}")
    return snapshots[0] if snapshots else None


def _written(folder: Path) -> str:
    """The name that finds just this folder: with the revision, where the id alone finds another or none."""
    id, revision = snapshot_of(folder)
    if not id:
        return str(folder)
    try:
        main = _snapshot(id, None)
    except ModelAmbiguous:
        main = None
    return id if main is not None and main.resolve() == folder else f"{id}@{revision}"


def _holds_model(folder: Path) -> bool:
    return any(True for pattern in ("config.json", "*.safetensors", "*.gguf") for _ in folder.glob(pattern))


def _folders(place: Path) -> list[Path]:
    """The folders in ``place`` that can be looked into, by name; none where there is no such place."""
    try:
        return sorted(path for path in place.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []
