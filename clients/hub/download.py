"""Getting a model from the hub, through the hub's own library; what goes wrong becomes one sentence each.

``look_up`` asks what there is and how much of it is missing; ``download`` gets it, into the hub's cache, where every
other program finds it too.  The library keeps each file that is complete, and goes on inside a file after a connection
was cut; a file that was not complete when the process ended begins again.  How far it is, is read off the files'
sizes, because that holds for every way in which the library moves bytes (plain HTTP, Xet).

What is printed is ``expertd.clients.cli.pull``; where models are found afterwards ``expertd.protocol.model_names``.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import importlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.protocol.errors import DiskFull, HubError, HubNotFound, HubRefused, HubUnreachable, NotACheckpoint
from expertd.protocol.sizes import show_size

NEEDED = (
    "*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt", "*.py", "*.jsonl",
)  # fmt: skip
"""What mlx-lm reads of a repository, in its top folder.  (A ``.py`` is run only where the user trusts its author.)"""

CONNECT_S = 5.0
"""How long the hub may take to answer the first question."""
LOOK_S = 0.2
"""How often it is looked how far the files are."""
FILES_AT_A_TIME = 4
"""Fewer than the library's eight: what is not complete when the process ends begins again."""
PIECE = 256 << 10
"""Bytes that are written at a time."""
ABANDONED_S = 86400.0
"""Nobody goes on with a file to which nothing was written for so long."""
LONGEST_REASON = 200
"""Characters of a reason that others give."""
LEFT_FREE = 1_000_000_000
"""Bytes that stay free on the disk."""

_TRANSPORTS = (("httpx2", "RequestError"), ("httpx", "RequestError"), ("requests", "RequestException"))
"""What the library's versions raise where the network fails."""


@dataclass(frozen=True)
class HubFile:
    """A file to get: its name, bytes, and the name that it has in the cache's ``blobs``."""

    name: str
    size: int
    blob: str


@dataclass(frozen=True)
class HubModel:
    """A version of a model on the hub: the ``files`` that are needed, and where the cache keeps them.

    ``revision`` is what was asked for (None: main), ``commit`` what that is now; ``blobs`` is a folder that need not
    exist.
    """

    id: str
    revision: str | None
    commit: str
    files: tuple[HubFile, ...]
    blobs: Path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> tuple[HubFile, ...]:
        """The files that are not here, or not complete."""
        snapshot = self.blobs.parent / "snapshots" / self.commit
        return tuple(
            file
            for file in self.files
            if not (snapshot / file.name).exists() and not (file.blob and (self.blobs / file.blob).exists())
        )

    @property
    def missing_bytes(self) -> int:
        """Bytes that have to be fetched."""
        return sum(file.size for file in self.missing)

    @property
    def name(self) -> str:
        """What to call it in a command."""
        return self.id if self.revision in (None, "main") else f"{self.id}@{self.revision}"


def look_up(id: str, revision: str | None = None) -> HubModel:
    """Ask the hub what it has.

    Raises:
        HubError: one of its kinds, for each way in which that fails.
        NotACheckpoint: there is no such model in mlx-lm's format.
    """
    hub = _library()
    with _told(id, revision):
        api = hub.HfApi()
        found = api.model_info(id, revision=revision, timeout=CONNECT_S, files_metadata=True)
    cache = Path(hub.constants.HF_HUB_CACHE)
    names = [file.rfilename for file in found.siblings or []]
    files = tuple(
        HubFile(file.rfilename, int(file.size or 0), (file.lfs.sha256 if file.lfs else file.blob_id) or "")
        for file in found.siblings or []
        if "/" not in file.rfilename and any(fnmatch.fnmatchcase(file.rfilename, pattern) for pattern in NEEDED)
    )
    if not any(file.name.endswith(".safetensors") for file in files):
        kinds = sorted({Path(name).suffix for name in names} & {".gguf", ".safetensors", ".bin", ".npz", ".pth"})
        has = f"it has {', '.join(kinds)} files of another layout" if kinds else "it has no weights"
        raise NotACheckpoint(f"{id} holds no model*.safetensors, so mlx-lm cannot load it ({has})")
    blobs = cache / ("models--" + id.replace("/", "--")) / "blobs"
    return HubModel(id, revision, str(found.sha), files, blobs)


def check_room(model: HubModel) -> None:
    """Refuse what would not fit on the disk.

    Raises:
        DiskFull: names what is needed and what is free.
    """
    place = model.blobs
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, model.missing_bytes
    if needed + LEFT_FREE > free:
        raise DiskFull(
            f"{model.name} needs {show_size(needed)} more, and {place} has {show_size(free)} free, of which "
            f"{show_size(LEFT_FREE)} stay free; make room, or set HF_HUB_CACHE to a folder on another disk"
        )


def download(model: HubModel, moved: Callable[[int], None], cancelled: threading.Event) -> Path:
    """Get what is missing, and return the folder that has it all.

    Args:
        moved: told of so many bytes more, from another thread, again and again.
        cancelled: once it is set, all ends within moments, and nothing that is incomplete is left.

    Raises:
        HubError: one of its kinds; what is complete is kept.
        DiskFull: the disk is full, or a limit on files is reached.
        KeyboardInterrupt: it was cancelled.
    """
    hub = _library()
    _sweep(model.blobs)
    with _told(model.id, model.revision, begun=True), _watching(model, moved):
        folder = hub.snapshot_download(
            model.id,
            revision=model.revision,
            allow_patterns=[glob.escape(file.name) for file in model.files],
            max_workers=FILES_AT_A_TIME,
            tqdm_class=_heedful(cancelled),
        )
    return Path(folder).resolve()


def _sweep(blobs: Path) -> None:
    """Remove what downloads that were killed have left of this model; the library neither uses nor removes it."""
    for part in _parts(blobs):
        with contextlib.suppress(OSError):  # another process may be removing it, too
            if time.time() - part.stat().st_mtime > ABANDONED_S:
                part.unlink()


def _heedful(cancelled: threading.Event) -> type[Any]:
    """A progress bar that shows nothing, and ends the thread that reports to it once ``cancelled`` is set.

    The library's threads cannot be told to stop in another way, and it waits for them.
    """
    tqdm: Any = _library().utils.tqdm

    class Heedful(tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> Any:
            if cancelled.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    return Heedful


# -- how far it is -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watching(model: HubModel, moved: Callable[[int], None]) -> Iterator[None]:
    """Tell ``moved`` what is added to the missing files while the body runs."""
    missing, ended = model.missing, threading.Event()
    old = set(_parts(model.blobs))  # what a process that was killed has left, or another one writes

    def here() -> int:
        parts = [path for path in _parts(model.blobs) if path not in old]
        return sum(_fetched(model.blobs, file, parts) for file in missing)

    def watch() -> None:
        known = 0
        while True:
            last = ended.wait(LOOK_S)
            found = max(known, here())  # a file that begins again takes nothing back
            moved(found - known)  # 0, too: a rate that falls tells that nothing comes
            known = found
            if last:
                return

    thread = threading.Thread(target=watch, name="expertd-download-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _parts(blobs: Path) -> list[Path]:
    return list(blobs.glob("*.incomplete"))


def _fetched(blobs: Path, file: HubFile, parts: list[Path]) -> int:
    """Bytes of a file that are here.  Blocks count, not the length, because Xet may write a file in any order."""
    if not file.blob or (blobs / file.blob).exists():
        return file.size if file.blob else 0
    sizes = [0]
    for part in parts:
        if part.name.startswith(file.blob):
            with contextlib.suppress(OSError):  # it has just been finished
                status = part.stat()
                sizes.append(min(status.st_size, status.st_blocks * 512))
    return min(max(sizes), file.size)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _told(id: str, revision: str | None, begun: bool = False) -> Iterator[None]:
    """Turn what the library and the system raise into our errors; ``begun``: files are being fetched."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2] or constants.ENDPOINT
    transports = tuple(
        getattr(importlib.import_module(module), name) for module, name in _TRANSPORTS if module in sys.modules
    )
    kept = "; what is complete is kept, and the same command goes on with the rest" if begun else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubRefused(
            f"{id} is given only to those who accept its conditions: do that at {constants.ENDPOINT}/{id}, "
            "then log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubNotFound(f"{id} has no revision {revision!r}; its page on {host} lists those that it has") from error
    except errors.RepositoryNotFoundError as error:
        raise HubNotFound(
            f"{host} has no model {id}, or it is private; check the name, or log in with: hf auth login"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(id, host, error, kept) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubUnreachable(
            "HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or give a model that 'expertd models' lists"
        ) from error
    except (OSError, *transports) as error:
        raise _failed(id, host, error, kept) from error
    except ValueError as error:
        raise HubError(f"{id} cannot be downloaded: {_reason(error)}") from error


def _refused(id: str, host: str, error: Exception, kept: str) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return HubRefused(f"{host} does not give {id} to you ({status}); log in with: hf auth login")
    if status == 429:
        return HubError(f"{host} says that too much was asked of it ({status}); try again later{kept}")
    return HubError(f"{host} does not answer as it should ({status} for {id}); try again later{kept}")


def _failed(id: str, host: str, error: BaseException, kept: str) -> HubError | DiskFull:
    """The error for one of the system or of the network, which the library may have wrapped in others."""
    deepest, cause = error, error.__cause__
    while cause is not None:
        deepest, cause = cause, cause.__cause__
    reason, cause = _reason(deepest), error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFull(f"{id} could not be written ({cause.strerror}); make room{kept}")
        if isinstance(cause, PermissionError):
            return HubError(f"{id} could not be written ({cause.strerror}: {cause.filename}); HF_HUB_CACHE names where")
        cause = cause.__cause__ or cause.__context__
    if kept:
        return HubError(f"the download of {id} from {host} broke off ({reason}){kept}")
    return HubUnreachable(
        f"{host} cannot be reached ({reason}); check the network, or give a model that 'expertd models' lists"
    )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    sentence = lines[0].partition(". ")[0].rstrip(".")[:LONGEST_REASON] if lines else type(error).__name__
    return re.sub(r"^\[Errno -?\d+\] ", "", sentence)


def _library() -> Any:
    """The hub's library, told to be quiet: what there is to say is said here."""
    import huggingface_hub.utils

    hub: Any = huggingface_hub
    hub.utils.logging.set_verbosity_error()
    hub.utils.disable_progress_bars()
    # Ten megabytes by default: so much would be lost by each cut, and a slow line would heed nobody for so long.
    hub.constants.DOWNLOAD_CHUNK_SIZE = PIECE
    return hub
