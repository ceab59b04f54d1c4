"""What happens between a worker's Attach and the core's: its files, its base weights, its past, what it hands back.

All that takes time (headers, records, base weights, segments on their way over the lifeline) is done before the core is
told, and a session that ends meanwhile leaves nothing behind.  What a session may have is the core's decision
(``expertd.daemon.core``), whether base weights are shared that of ``expertd.daemon.bases``, whether a pool that is
handed back is what it says that of ``expertd.daemon.pools``.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from expertd.daemon.bases import SharedBases
from expertd.daemon.blocks import OpenFiles
from expertd.daemon.core import Core, events
from expertd.daemon.core.bases import Base
from expertd.daemon.index import BlockIndex, build_index
from expertd.daemon.lifelines import Lifelines
from expertd.daemon.policy import Block
from expertd.daemon.pools import SharedPool, close_all, handed_pool
from expertd.protocol import messages
from expertd.protocol.connection import control_identity, data_identity
from expertd.protocol.errors import LimitReached, MessageInvalid
from expertd.protocol.logs import Log
from expertd.protocol.manifest import Manifest
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home

log = Log("expertd.daemon")

SESSION_LIMIT = 128
MODEL_LIMIT = 32
TURN_S, LET_COME_TURNS = 0.05, 10
"""Whoever comes first to a new daemon waits so often so long for those who have the model's base weights already."""

Handed = tuple[messages.PoolInfo, SharedPool]
"""A pool of an earlier daemon, as its session names it, and mapped."""


@dataclass(frozen=True)
class Peer:
    """A session's lifeline, and where its messages come from and go to."""

    token: bytes
    pid: int
    mode: str
    has_base: bool

    @property
    def control(self) -> bytes:
        return control_identity(self.token)

    @property
    def data(self) -> bytes:
        return data_identity(self.token)


@dataclass(frozen=True)
class Ground:
    """What sessions are opened on; all of it is the server's, and used by its loop alone.

    Attributes:
        peers: of open sessions, by their numbers; they are added here.
        pools: by their numbers; those that are handed back are added here.
        files: by models' keys; those of a model that comes are added here.
        feed: gives an event to the core, and has done what that says.
        share_out: gives the core what there is to divide, after base weights have changed.
        budget: bytes that the user allows.
        room: bytes that the machine could give at once.
        recall: reads what an earlier daemon has left of a model, on another thread.
        awaited: whether other processes than one (its id) hold something of a model (a key) of an earlier daemon, and
            none has come yet.
    """

    home: Home
    core: Core
    bases: SharedBases
    lifelines: Lifelines
    peers: dict[int, Peer]
    pools: dict[int, SharedPool]
    files: dict[str, OpenFiles]
    feed: Callable[[events.Event], None]
    share_out: Callable[[], None]
    budget: Callable[[], int]
    room: Callable[[], int]
    recall: Callable[[Manifest], events.Recall | None]
    awaited: Callable[[str, int], bool]


class Attaching:
    """Owned by the daemon's loop.

    Attributes:
        under_way: how many sessions are being opened.
    """

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._known = ground.bases.known
        self._indexing: dict[str, asyncio.Task[BlockIndex]] = {}
        self._numbers = itertools.count(secrets.randbits(48))  # none that a predecessor has given
        self.under_way = 0

    def begin(self, identity: bytes, message: messages.Attach) -> Coroutine[object, object, None]:
        """Open a session; it is under way from now on, and the caller awaits the rest.

        Raises:
            MessageInvalid, LimitReached, and what ``build_index`` says of its files: it cannot be opened.  What the
                core does not take is answered by its Refuse.
        """
        self.under_way += 1
        return self._attach(identity, message)

    async def _attach(self, identity: bytes, message: messages.Attach) -> None:
        ground, manifest = self._ground, message.manifest
        key, opening = manifest.key, self._known.opening
        opening[key] += 1
        base: Base | None = None
        handed: list[Handed] = []
        try:
            if not ground.lifelines.attach(message.token):
                raise MessageInvalid("an Attach came whose lifeline is not open")
            if identity != control_identity(message.token):
                raise MessageInvalid("an Attach came from a socket that is not named after its lifeline")
            self._check_limits(key)
            index = await self._index(manifest)
            left = await self._recall(manifest)
            came = await ground.lifelines.handed(message.token, _held(message))
            base = self._adopt_base(message, came)
            handed = self._handed(message, came)
            if message.held_base is None:
                await self._let_others_come(manifest, message.pid)
                base = await self._share_base(message, index)
            self._open(message, index, base, left, handed)
        finally:
            close_all(handed)
            ground.lifelines.attached(message.token)
            self.under_way -= 1
            opening[key] -= 1
            if not opening[key]:
                del opening[key]
            if base is not None:
                base.opening -= 1
                ground.share_out()

    def _check_limits(self, key: str) -> None:
        if len(self._ground.peers) + self.under_way > SESSION_LIMIT:
            raise LimitReached(f"{SESSION_LIMIT} sessions are open, which is the limit; close some, or try again later")
        loaded = self._ground.core.models.keys()
        if key not in loaded and len(loaded | self._indexing.keys()) >= MODEL_LIMIT:
            idle = self._ground.core.longest_idle
            if idle is None:
                raise LimitReached(
                    f"{MODEL_LIMIT} models are in use, which is the limit; end a program that uses one "
                    "('expertd status' names them), or try again later"
                )
            self._ground.feed(events.Unwanted(idle))

    async def _index(self, manifest: Manifest) -> BlockIndex:
        """The index of a model's blocks; sessions that come at the same moment share one."""
        key = manifest.key
        if key not in self._indexing:
            packed = self._ground.home.packed
            self._indexing[key] = asyncio.create_task(asyncio.to_thread(build_index, manifest, packed))
        task = self._indexing[key]
        try:
            return await asyncio.shield(task)
        finally:
            if self._indexing.get(key) is task:
                del self._indexing[key]

    async def _recall(self, manifest: Manifest) -> events.Recall | None:
        """What there is to bring in of a model that comes, if it is not here already."""
        if manifest.key in self._ground.core.models:
            return None
        return await asyncio.to_thread(self._ground.recall, manifest)

    # -- base weights --------------------------------------------------------------------------------------------------

    def _adopt_base(self, message: messages.Attach, came: dict[int, tuple[int, int]]) -> Base | None:
        """The base weights of an earlier daemon that a session hands back, if they are good; see ``SharedBases``."""
        info = message.held_base
        if info is None or info.segment not in came:
            return None
        most, needed, opened = self._room_for_base(message.manifest.key)
        return self._ground.bases.adopt(message.manifest, info, *came.pop(info.segment), most, needed, opened)

    async def _let_others_come(self, manifest: Manifest, pid: int) -> None:
        """Give programs that outlive an earlier daemon a moment: what they have of ``manifest`` is not read again.

        They look for a daemon ten times a second; one that is stopped is not waited for longer, and ``pid`` not at all:
        it is the one that waits.
        """
        for _ in range(LET_COME_TURNS):
            here = manifest.key in self._ground.core.models or self._known.find(manifest.base_key) is not None
            if not manifest.base or here or not self._ground.awaited(manifest.key, pid):
                return
            await asyncio.sleep(TURN_S)

    async def _share_base(self, message: messages.Attach, index: BlockIndex) -> Base | None:
        """The base weights of a model that is being opened, if they can be shared; see ``SharedBases.share``.

        Raises:
            MessageInvalid: whoever opens it has died meanwhile.
        """
        manifest = message.manifest
        share = self._ground.bases.share(manifest, index, *self._room_for_base(manifest.key))
        end_of = self._ground.lifelines.end_of(message.token)
        sharing, end = asyncio.ensure_future(share), asyncio.ensure_future(end_of)
        try:
            await asyncio.wait((sharing, end), return_when=asyncio.FIRST_COMPLETED)
            if sharing.done():
                return sharing.result()
        finally:
            end.cancel()
            sharing.cancel()
        raise MessageInvalid("the lifeline of an Attach has ended")

    def _room_for_base(self, model: str) -> tuple[int, int, bool]:
        """What decides whether base weights have a place: see ``Bases.refusal``."""
        core = self._ground.core
        in_use = [each.key for each in core.models.values() if each.in_use]
        return self._ground.budget(), core.smallest_budget + self._known.coming(in_use, model), model in in_use

    # -- what an earlier daemon held -----------------------------------------------------------------------------------

    def _handed(self, message: messages.Attach, came: dict[int, tuple[int, int]]) -> list[Handed]:
        """The pools of an earlier daemon that a session hands back, if they are good; their tables are copied.

        A session that was cut off from a daemon that lives hands back pools of ours.  These are not taken: what their
        tables name may go at any moment.
        """
        ours = {pool.nonce for pool in self._ground.pools.values() if not pool.handed}
        good = []
        for info in message.held:
            if info.segment in came and info.nonce not in ours:
                pool = handed_pool(message.manifest, info, *came.pop(info.segment))
                if isinstance(pool, SharedPool):
                    good.append((info, pool))
                else:
                    log.warning("a pool that a session handed back is not used: %s", pool, pid=message.pid)
        for _, descriptor in came.values():
            os.close(descriptor)
        return good

    def _open(
        self,
        message: messages.Attach,
        index: BlockIndex,
        base: Base | None,
        left: events.Recall | None,
        handed: list[Handed],
    ) -> None:
        """Have the core open a session, whose model's files, base weights and past were looked at.

        Raises:
            MessageInvalid: its lifeline is another session's.
        """
        ground, manifest, number = self._ground, message.manifest, next(self._numbers)
        if not ground.lifelines.bind(message.token, number):
            # It died meanwhile (and nobody hears this), or it has a session already.
            raise MessageInvalid("an Attach came whose lifeline has a session already")
        has_base = message.held_base is not None
        ground.peers[number] = Peer(message.token, message.pid, message.mode, has_base)
        if base is not None:
            base.users.add(number)
        files = ground.files.setdefault(manifest.key, OpenFiles(index))
        files.use(index.store)
        known = manifest.key in ground.core.models
        holding, pools = self._take(manifest, handed)
        room = ground.room() if holding else 0
        ground.feed(events.Attach(number, message.pid, message.mode, manifest, holding, room))
        if left is not None and not known:
            ground.feed(left)
        if pools:
            ground.feed(events.HandedBack(number, manifest.key, pools))

    def _take(self, manifest: Manifest, handed: list[Handed]) -> tuple[int, tuple[events.Handed, ...]]:
        """Take these pools over, and their bytes; those that another session has handed back are here already."""
        pools, taken, holding = self._ground.pools, [], 0
        while handed:
            info, pool = handed.pop()
            where: dict[Block, int] = {}
            there = pools.get(info.segment)
            if there is None:
                pools[info.segment] = pool
                holding += pool.layout.size
                where = {(info.layers[row], expert): int(pool.table[row, expert]) for row, expert in pool.resident}
            else:
                pool.close()
                if there.nonce != info.nonce:
                    log.warning("a pool that a session handed back is not used: its number is another's")
                    continue
            taken.append(events.Handed(info.segment, tuple(info.layers), pool.layout, where))
        if holding:
            blocks, name = sum(len(each.where) for each in taken), shown_name(Path(manifest.folder))
            log.info("a session handed back what an earlier daemon held", model=name, blocks=blocks)
        return holding, tuple(taken)


def _held(message: messages.Attach) -> list[int]:
    """The segments that a session hands back."""
    base = [] if message.held_base is None else [message.held_base.segment]
    return [*base, *(info.segment for info in message.held)]
