"""API keys: the file that they stand in, whether a request has one of them, and where one is needed.

A line of the file is ``KEY`` or ``NAME KEY``; ``#`` begins a comment.  ``KeyFile`` reads it anew when it has changed,
so a key can be added or revoked while the gateway runs; a file that cannot be used any more lets nobody in.  Names are
what the log says of a request; keys are written nowhere.  Who asks for them is ``expertd.clients.gateway.access``.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertd.protocol.errors import ConfigInvalid, KeyFileInvalid
from expertd.protocol.logs import Log

__all__ = ["SHORTEST_KEY", "Key", "KeyFile", "check_exposure", "find", "given_key", "is_loopback", "parse_keys"]

log = Log(__name__)

SHORTEST_KEY = 16
"""Characters of a key at least: fewer can be guessed over a network."""
LONGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Key:
    """A key and what it is called; a key without a name is called after its line.  ``secret`` is never shown."""

    name: str
    secret: bytes = field(repr=False)


def parse_keys(text: str, where: object) -> list[Key]:
    """The keys in ``text``, which stands in the file ``where``.

    Raises:
        KeyFileInvalid: a line is none of the two forms, a key is too short, or there is none; names the line only.
    """
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2:
            raise KeyFileInvalid(f"line {number} of {where} has {len(words)} words; write KEY, or NAME KEY")
        if len(words[-1]) < SHORTEST_KEY or not words[-1].isascii():
            raise KeyFileInvalid(
                f"the key in line {number} of {where} has to be at least {SHORTEST_KEY} characters of ASCII; "
                "make one with: openssl rand -hex 24"
            )
        keys.append(Key(words[0] if len(words) == 2 else f"line {number}", words[-1].encode()))
    if not keys:
        raise KeyFileInvalid(f"{where} has no key; write one a line, made for example with: openssl rand -hex 24")
    return keys


def find(keys: Sequence[Key], secret: str) -> str | None:
    """The name of the key that ``secret`` is, or None.  Takes as long whichever it is, or whether it is one at all."""
    given = secret.encode(errors="surrogateescape")
    found = None
    for key in keys:
        if hmac.compare_digest(key.secret, given):
            found = key.name
    return found


def given_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request has with it: as OpenAI's clients send it, as Anthropic's do, or as browsers' password.

    Of HTTP Basic the user's name does not matter.
    """
    kind, _, rest = headers.get("Authorization", "").strip().partition(" ")
    rest = rest.strip()
    if kind.lower() == "bearer" and rest:
        return rest
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return headers.get("x-api-key") or None


class KeyFile:
    """The keys of a file as it is now.  Owned by the gateway's loop; a look at an unchanged file takes microseconds."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            KeyFileInvalid: it cannot be used; says why and what to do.
        """
        self._path = path
        self._seen = self._look()
        self._keys = self._read()
        self._broken = ""

    def name_of(self, secret: str | None) -> str | None:
        """What the key ``secret`` is called, or None if it is none of the file's.

        Raises:
            KeyFileInvalid: the file has changed and cannot be used; in words that whoever asks may read.
        """
        self._refresh()
        if self._broken:
            raise KeyFileInvalid("this gateway cannot read its keys now; its log says why")
        return None if secret is None else find(self._keys, secret)

    def _refresh(self) -> None:
        try:
            seen = self._look()
            if seen == self._seen and not self._broken:
                return
            keys = self._read()
        except KeyFileInvalid as error:
            if error.message != self._broken:
                log.error("nobody is let in: %s", error.message)
            self._broken = error.message
            return
        self._seen, self._keys, self._broken = seen, keys, ""
        log.info("keys were read again", keys=len(keys))

    def _look(self) -> tuple[int, ...]:
        """What differs when the file has changed."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise KeyFileInvalid(f"the key file {self._path} cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(found.st_mode):
            raise KeyFileInvalid(f"the key file {self._path} is not a file")
        if found.st_mode & 0o077:
            raise KeyFileInvalid(
                f"others can read the key file {self._path}; make it your own with: chmod 600 {self._path}"
            )
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    def _read(self) -> list[Key]:
        try:
            with self._path.open("rb") as file:
                text = file.read(LONGEST_FILE + 1)
        except OSError as error:
            raise KeyFileInvalid(f"the key file {self._path} cannot be read ({error.strerror})") from error
        if len(text) > LONGEST_FILE:
            raise KeyFileInvalid(f"the key file {self._path} is longer than {LONGEST_FILE} bytes; is it the right one?")
        try:
            return parse_keys(text.decode("utf-8-sig"), self._path)
        except UnicodeDecodeError as error:
            raise KeyFileInvalid(f"the key file {self._path} is not text; write one key a line") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    return host.lower() == "localhost" or _is_loopback_address(host)


def check_exposure(host: str, has_keys: bool) -> None:
    """Refuse to listen where others can reach it without a key.

    Raises:
        ConfigInvalid: says both ways out.
    """
    if not has_keys and not is_loopback(host):
        raise ConfigInvalid(
            f"other machines could reach {host}, so a key is needed: give a file of keys with --api-key-file, "
            "or listen on 127.0.0.1, which only this machine reaches"
        )


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
