"""``expertd.clients.Client``: a Python program's view of the daemon, and its hand on it.

    from expertd.clients import Client

    with Client() as daemon:
        print(daemon.status().models[0].hits)
        daemon.budget("8GiB")
        daemon.warm("Qwen3-30B-A3B-4bit")

Computing with a model is ``expertd.load``, which this does not need: it imports no mlx, and never starts a daemon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from math import inf
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from expertd.protocol.connection import Connection
from expertd.protocol.errors import CheckpointError, DaemonLost, ModelNotLoaded
from expertd.protocol.messages import (
    AskStatus,
    BudgetSet,
    Happened,
    Message,
    Pin,
    Pinned,
    SetBudget,
    Status,
    Subscribe,
    Subscribed,
    Unload,
    Unloaded,
    Warm,
    Warming,
    expect,
)
from expertd.protocol.model_names import find_model
from expertd.protocol.paths import Home, expanded
from expertd.protocol.rendezvous import connect
from expertd.protocol.routing import pack
from expertd.protocol.sizes import parse_budget

RENEW_S = 10.0
"""How often a subscription is renewed; a daemon that does not answer for so long is taken for lost."""

A = TypeVar("A", bound=Message)

Block = tuple[int, int]
"""An expert of a MoE layer: both counted from 0 on, layers over the MoE layers of the model."""


class Client:
    """A connection to the daemon of a home.  Not thread-safe: each thread has its own.

    Every method raises DaemonLost if the daemon does not answer, and what else its own words say.  Models are named by
    the path or the name of their folder, as ``status()`` shows them, by their id on the hub, or by any other name that
    finds them on this machine.
    """

    def __init__(self, home: Path | str | None = None) -> None:
        """Connect.

        Args:
            home: the daemon's home; by default the one that EXPERTD_HOME names, else ``~/.expertd``.
        Raises:
            DaemonNotRunning: there is none.
            ProtocolMismatch: it is of another version.
            PathInvalid: see ``expertd.protocol.paths.expanded``.
        """
        self._home = Home.current() if home is None else Home(expanded(home).absolute())
        self._connection = connect(self._home, "client")

    def status(self) -> Status:
        """All there is to know: models with hits, misses and sessions, memory, pressure, devices."""
        return self._connection.ask(AskStatus(), Status)

    def budget(self, size: str | int) -> int:
        """Set the bytes that experts may take (``"8GiB"``, a number, ``"auto"``), until this daemon ends.

        Returns:
            The new budget in bytes.
        Raises:
            SizeInvalid: ``size`` is none.
            BudgetTooSmall: the models in use need more.
        """
        return self._connection.ask(SetBudget(budget=parse_budget(str(size))), BudgetSet).budget

    def warm(self, model: str | Path, blocks: Iterable[Block] = ()) -> int:
        """Have blocks brought in while there is room, in their order; none named: all, the most used first.

        They are read in the background, as long as some session uses the model; ``status()`` counts them down in
        ``warming``.

        Returns:
            How many are to be brought in now.
        Raises:
            ModelNotLoaded: the daemon holds nothing of the model; load it first.
            BlocksInvalid: the model has no such block.
        """
        packed = _packed(blocks)
        return self._ask(model, lambda name: Warm(model=name, blocks=packed), Warming).blocks

    def pin(self, model: str | Path, blocks: Iterable[Block]) -> int:
        """Have blocks stay as long as the daemon holds the model, and bring in those that are absent.

        One for which there is no free slot now stays once it was used.  A Fetch that finds no other room takes theirs.

        Returns:
            How many blocks of the model are pinned now.
        Raises:
            ModelNotLoaded: the daemon holds nothing of the model; load it first.
            BlocksInvalid: the model has no such block, or more than half of a pool would be pinned.
        """
        packed = _packed(blocks)
        return self._ask(model, lambda name: Pin(model=name, blocks=packed), Pinned).blocks if packed else 0

    def unpin(self, model: str | Path, blocks: Iterable[Block] = ()) -> int:
        """Blocks need not stay any longer; none named: none of the model's.  Raises and returns as ``pin``."""
        packed = _packed(blocks)
        return self._ask(model, lambda name: Pin(model=name, blocks=packed, pinned=False), Pinned).blocks

    def unload(self, model: str | Path) -> int:
        """Give back the memory of a model that nobody uses.

        Returns:
            Its bytes.
        Raises:
            ModelNotLoaded: the daemon holds nothing of it.
            ModelInUse: sessions use it.
        """
        return self._ask(model, lambda name: Unload(model=name), Unloaded).bytes

    def events(self) -> Iterator[Happened]:
        """What happens in the daemon from now on: models and sessions that come and go, pressure, failed reads.

        It is what ``expertd logs --daemon`` shows: ``event`` in words, ``facts`` by name.  It comes over a connection
        of its own, so that all else may be asked meanwhile, and goes on until the caller stops asking.

        Raises:
            DaemonLost: the daemon has ended, or hangs.
        """
        with connect(self._home, "client") as connection:
            renewed_at, answered = -inf, True
            while True:
                now = time.monotonic()
                if answered and now >= renewed_at + RENEW_S:
                    connection.send(Subscribe())
                    renewed_at, answered = now, False
                # Who asks slowly finds the answer behind what has happened meanwhile; only silence proves anything.
                message = connection.receive(renewed_at + RENEW_S - now)
                if message is None and not answered:
                    raise DaemonLost(f"the daemon of {self._home.root} is gone, or hangs")
                if isinstance(message, Happened):
                    yield message
                elif message is not None:
                    answered = bool(expect(message, Subscribed))

    def _ask(self, model: str | Path, question: Callable[[str], Message], kind: type[A]) -> A:
        return ask_about(self._connection, self._home, model, question, kind)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask_about(
    connection: Connection, home: Home, model: str | Path, question: Callable[[str], Message], kind: type[A]
) -> A:
    """The answer about a model that is called as anywhere: by a folder, or by a name that finds one.

    The daemon is asked first by what was given, because it also holds models whose folders are gone.

    Raises:
        ExpertdError: what the daemon answers; ModelNotLoaded names the model as it was given.
    """
    path = expanded(model)
    given = str(path.resolve()) if path.is_dir() else str(model)
    try:
        return connection.ask(question(given), kind)
    except ModelNotLoaded as error:
        try:
            found = str(find_model(given, home))
        except CheckpointError:
            raise error from None
        if found == given:
            raise
        try:
            return connection.ask(question(found), kind)
        except ModelNotLoaded:
            raise error from None


def _packed(blocks: Iterable[Block]) -> bytes:
    return b"".join(pack(layer, [expert]) for layer, expert in blocks)
