"""A stand-in for the model hub: a real HTTP server that speaks what ``huggingface_hub`` asks of the real one.

It serves folders as repositories, large files by a redirect as the hub does, with knobs for what goes wrong.  It cannot
stand in for Xet, the hub's other way to move bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 64 << 10
LARGE = 4096
"""Files of more bytes are "LFS": known by their SHA-256, and sent by another address."""


@dataclass
class Repository:
    """A model on the hub: its files by name, what its revisions are, and how it behaves.

    Attributes:
        gated: everybody may see what there is, nobody gets a file.
        refused: the status of every answer, with the header ``X-Error-Code`` where there is one.
        cuts: by file, after how many bytes to cut the connection, once each.
        cut_always: after so many bytes of any large file, every time.
        rate: bytes a second.
        claimed: sizes that are claimed in place of the true ones.
        token: what ``Authorization`` has to bring; without it the repository seems not to exist.
    """

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "c0ff"
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    refused: tuple[int, str] | None = None
    cuts: dict[str, list[int]] = field(default_factory=dict)
    cut_always: int | None = None
    rate: float | None = None
    claimed: dict[str, int] = field(default_factory=dict)
    token: str | None = None

    @classmethod
    def of(cls, folder: Path, **knobs: Any) -> Repository:
        """The files of a folder."""
        names = [path for path in folder.rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in names}, **knobs)

    def resolve(self, revision: str) -> str | None:
        """The commit that a revision is."""
        known = {"main": self.commit, self.commit: self.commit, **self.branches}
        known |= {commit: commit for commit in self.branches.values()}
        return known.get(unquote(revision))


class Hub:
    """The running server: ``url``, the repositories by id, and the requests that came, as ``"GET /path 100-"``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files_url = url.replace("127.0.0.1", "localhost")  # another host, as the hub's large files have
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    def fetched(self) -> list[str]:
        """The requests for the bytes of files."""
        return [line for line in self.requests if line.startswith("GET /") and not line.startswith("GET /api")]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on a port of its own, until the body ends."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing: ``Hub.requests`` has it."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        self.hub.requests.append(f"{self.command} {unquote(path)} {wanted}".strip())
        api = re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?/?", path)
        file = re.fullmatch(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path)
        large = re.fullmatch(r"/cdn/(?P<id>[^/]+/[^/]+)/(?P<name>.+)", path)
        match = api or file or large
        if match is None:
            self._refuse(404, "")
            return
        repository = self.hub.repositories.get(match["id"])
        if repository is None or (
            repository.token is not None
            and large is None  # that address is the secret
            and self.headers.get("Authorization") != f"Bearer {repository.token}"
        ):
            self._refuse(401, "RepoNotFound")  # so that nobody learns what is private
        elif repository.refused is not None:
            self._refuse(*repository.refused)
        elif api is not None:
            self._describe(repository, match["id"], match["kind"], match["revision"] or "main")
        elif large is not None:
            self._send_file(repository, unquote(match["name"]))
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        else:
            self._resolve(repository, match["id"], match["revision"], unquote(match["name"]))

    def _describe(self, repository: Repository, id: str, kind: str | None, revision: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings, tree = [], []
        for name, content in sorted(repository.files.items()):
            size = repository.claimed.get(name, len(content))
            about: dict[str, Any] = {"size": size}
            if len(content) > LARGE:
                sha = hashlib.sha256(content).hexdigest()
                siblings.append({"rfilename": name, "blobId": _oid(content), **about, "lfs": {
                    "sha256": sha, "size": size, "pointerSize": 130,
                }})  # fmt: skip
                tree.append({"type": "file", "path": name, "oid": _oid(content), **about, "lfs": {
                    "oid": sha, "size": size, "pointerSize": 130,
                }})  # fmt: skip
            else:
                siblings.append({"rfilename": name, "blobId": _oid(content), **about})
                tree.append({"type": "file", "path": name, "oid": _oid(content), **about})
        body: Any = tree if kind == "tree" else {
            "_id": "0", "id": id, "modelId": id, "sha": commit, "private": False, "gated": repository.gated,
            "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
        }  # fmt: skip
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repository: Repository, id: str, revision: str, name: str) -> None:
        commit = repository.resolve(revision)
        if commit is None or name not in repository.files:
            self._refuse(404, "RevisionNotFound" if commit is None else "EntryNotFound")
            return
        content = repository.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'}
        if len(content) <= LARGE:
            self._send(200, content, headers)
            return
        sha = hashlib.sha256(content).hexdigest()
        size = str(repository.claimed.get(name, len(content)))
        location = f"{self.hub.files_url}/cdn/{id}/{name}"
        self._send(302, b"", {**headers, "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": size, "Location": location})

    def _send_file(self, repository: Repository, name: str) -> None:
        content = repository.files[name]
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = repository.cuts[name].pop(0) if repository.cuts.get(name) else repository.cut_always
        for at in range(0, len(body), CHUNK):
            piece = body[at : at + CHUNK]
            if end is not None and at + len(piece) >= end:
                self.wfile.write(piece[: max(0, end - at)])
                self.close_connection = True
                return
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True  # the client has gone
                return
            if repository.rate is not None:
                time.sleep(len(piece) / repository.rate)

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"refused with {status}"} if code else {}
        self._send(status, b"{}", headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
