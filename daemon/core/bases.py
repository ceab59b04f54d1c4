"""Which base segments there are, who uses them, and what they take of the budget.  Pure.

The base weights of a model are read once, never change, and are nobody's to evict: so all there is to decide is whether
one is worth its place, and when nobody wants it any more.  ``core.Core`` divides what they leave of the budget.  Who
reads them, and how they reach sessions, is ``expertd.daemon.bases``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from expertd.daemon.core.plan import smallest
from expertd.protocol.layout import base_layout
from expertd.protocol.manifest import Manifest
from expertd.protocol.sizes import show_size


@dataclass
class Base:
    """The base weights of one model in one segment.

    Attributes:
        key: ``Manifest.base_key``.
        model: ``Manifest.key``.
        size: bytes of its segment.
        read: bytes that were read for it.
        needs: bytes that pools of its model need at least.
        opening: how many sessions are being opened that wait for it, or have it already.
        users: sessions that have it.
        copy: an earlier daemon's, beside one that is shared: it counts as long as its sessions have it, and nobody else
            gets it.
    """

    key: str
    model: str
    segment: int
    size: int
    needs: int = 0
    read: int = 0
    opening: int = 0
    users: set[int] = field(default_factory=set)
    copy: bool = False

    @property
    def in_use(self) -> bool:
        return bool(self.opening or self.users)


class Bases:
    """All base segments, by their keys; owned by one loop.

    Attributes:
        problems: why base weights are not shared, by models' keys.
        opening: how many sessions of a model are being opened, by its key.
    """

    def __init__(self, first_segment: int) -> None:
        self._next = first_segment
        self._bases: dict[str, Base] = {}
        self.problems: dict[str, str] = {}
        self.opening: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Base]:
        return iter(self._bases.values())

    @property
    def used(self) -> int:
        """Bytes of all segments."""
        return sum(base.size for base in self)

    @property
    def in_use(self) -> int:
        """Bytes of those that cannot be given back now."""
        return sum(base.size for base in self if base.in_use)

    @property
    def going(self) -> dict[str, int]:
        """Bytes of those that go with their models, because nobody uses them, by the models' keys."""
        idle = [base for base in self if not base.in_use]
        return {model: sum(b.size for b in idle if b.model == model) for model in {base.model for base in idle}}

    def find(self, key: str) -> Base | None:
        """The base weights with that key."""
        return self._bases.get(key)

    def of_model(self, model: str) -> list[Base]:
        """Those of one model: more than one only if its users load it in different ways, or some have copies."""
        return [base for base in self if base.model == model]

    def of_session(self, session: int) -> Base | None:
        """The base weights that ``session`` has from here."""
        return next((base for base in self if session in base.users), None)

    def coming(self, in_use: Collection[str], but: str) -> int:
        """Bytes that pools of models need at least whose base weights have a place and which are not ``in_use`` yet.

        Args:
            in_use: keys of the models that are.
            but: the key of one that is not counted.
        """
        others = {base.model: base.needs for base in self if base.opening and base.model not in {but, *in_use}}
        return sum(others.values())

    def refusal(self, manifest: Manifest, most: int, needed: int, opened: bool) -> str | None:
        """Why the base weights of ``manifest`` have no place; None if they have.

        Args:
            most: bytes that the user allows.
            needed: those that pools of the models in use, and of others that are ``coming``, need at least.
            opened: whether this model is one of these.
        """
        size = base_layout(manifest.base)[1]
        others = self.in_use + needed + (0 if opened else smallest(manifest))
        if others + size <= most:
            return None
        return (
            f"the budget of {show_size(most)} has no room for {show_size(size)} of base weights beside the "
            f"{show_size(others)} that are needed at least, so each process holds its own; give it "
            f"{others + size} bytes ({show_size(others + size)}) or more"
        )

    def add(self, manifest: Manifest) -> Base:
        """Base weights that are being read from now on."""
        return self._add(manifest.base_key, manifest, copy=False)

    def _add(self, key: str, manifest: Manifest, copy: bool) -> Base:
        size, needs = base_layout(manifest.base)[1], smallest(manifest)
        base = Base(key, manifest.key, self._next, size, needs, copy=copy)
        self._next += 1
        self._bases[base.key] = base
        return base

    def copy(self, manifest: Manifest, nonce: bytes) -> Base:
        """An earlier daemon's, which ``nonce`` names, that sessions have beside the one that is shared."""
        key = f"{manifest.base_key} {nonce.hex()}"
        return self._bases.get(key) or self._add(key, manifest, copy=True)

    def failed(self, base: Base, why: str) -> None:
        """They could not be read, or had no memory: as if they had never been."""
        self._bases.pop(base.key, None)
        self.problems[base.model] = why

    def given_up(self, base: Base) -> None:
        """Nobody waits for them any more, and they were not all read: as if they had never been."""
        del self._bases[base.key]

    def ended(self, session: int) -> None:
        """A session is over."""
        for base in self:
            base.users.discard(session)

    def leave(self, models: Collection[str]) -> list[Base]:
        """Forget, and return, those that nobody uses and that are copies, or whose model is not among ``models``.

        Problems are forgotten with their models; those of models that are being opened stay.
        """
        gone = [base for base in self if not base.in_use and (base.copy or base.model not in models)]
        for base in gone:
            del self._bases[base.key]
        for model in [model for model in self.problems if model not in models and not self.opening[model]]:
            del self.problems[model]
        return gone
