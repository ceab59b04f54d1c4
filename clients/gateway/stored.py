"""Responses that are kept, to be looked at, gone on from and referred to: in memory, as long as the gateway runs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from expertd.clients.gateway.responses import Items
from expertd.protocol.errors import ResponseNotFound

__all__ = ["Stored"]

MOST = 1000
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class _Kept:
    response: dict[str, Any]
    given: Items
    items: Items
    size: int

    @property
    def own(self) -> Items:
        """Those of its items that came with it."""
        return [*self.given, *self.response["output"]]


class Stored:
    """Responses by id, and their items, bounded in number and in bytes (as JSON)."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._items: dict[str, dict[str, dict[str, Any]]] = {}
        """By their ids, and then by those of the responses that they came with, the latest last: clients send back what
        they were told, and choose ids of their own."""
        self.size = 0
        """Bytes of all that is kept."""

    def keep(self, response: dict[str, Any], given: Items, earlier: Items) -> None:
        """Keep a response to ``given``, which went on from the items ``earlier``."""
        items = [*earlier, *given, *response["output"]]
        size = len(msgspec.json.encode([response, items]))
        kept = self._kept[response["id"]] = _Kept(response, given, items, size)
        self.size += size
        for item in kept.own:
            self._items.setdefault(item["id"], {})[response["id"]] = item
        while len(self._kept) > self._most or (self.size > self._most_bytes and len(self._kept) > 1):
            self.forget(next(iter(self._kept)))

    def response(self, id: str) -> dict[str, Any]:
        """A response as it was given.  This and what follows raise ResponseNotFound."""
        return self._find(id).response

    def given(self, id: str) -> Items:
        """The items that a response answered, without those of earlier ones."""
        return self._find(id).given

    def items(self, id: str | None) -> Items:
        """All that a response to come goes on from."""
        return [] if id is None else self._find(id, "previous_response_id").items

    def item(self, id: str) -> dict[str, Any] | None:
        """An item that came with a response that is kept, as input or output: as it came with the latest."""
        found = self._items.get(id)
        return None if found is None else next(reversed(found.values()))

    def forget(self, id: str) -> None:
        """Keep a response no longer."""
        kept = self._find(id)
        del self._kept[id]
        self.size -= kept.size
        for item in kept.own:
            found = self._items.get(item["id"], {})
            found.pop(id, None)  # A response may bring the same id twice.
            if not found:
                self._items.pop(item["id"], None)

    def _find(self, id: str, param: str | None = None) -> _Kept:
        kept = self._kept.get(id)
        if kept is None:
            raise ResponseNotFound(
                f"there is no response '{id}'; the gateway keeps the latest {self._most}, until it ends", param=param
            )
        return kept
