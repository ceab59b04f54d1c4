"""Events on their way from a worker to whoever reads them (``clients.gateway.served``): passed on at once, or kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from expertd.clients.gateway.served import Events
from expertd.protocol.errors import WorkerUnavailable
from expertd.protocol.messages import Delta, Finished

ONE, TWO, THREE = (Delta(request=1, text=text, tokens=1) for text in ("one", "two", "three"))
END = Finished(request=1, reason="stop", prompt_tokens=1, completion_tokens=3)


class Reader:
    """Takes what it may, and notes it."""

    def __init__(self, takes: Callable[[object], bool] = lambda event: True) -> None:
        self.takes = takes
        self.passed: list[object] = []

    def __call__(self, place: int, event: object) -> bool:
        if not self.takes(event):
            return False
        self.passed.append(event)
        return True


def with_events(use: Callable[[Events], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await use(Events())

    asyncio.run(run())


async def waits(events: Events, reader: Reader) -> asyncio.Task[Any]:
    """A reader that waits now."""
    task = asyncio.create_task(events.get(20.0, reader))
    await asyncio.sleep(0)
    return task


def test_a_reader_that_waits_is_not_woken_for_what_it_takes() -> None:
    async def use(events: Events) -> None:
        reader = Reader(lambda event: event is not END)
        task = await waits(events, reader)
        for event in (ONE, TWO):
            events.put(0, event)
            await asyncio.sleep(0)
        assert reader.passed == [ONE, TWO] and not task.done() and events.empty
        events.put(0, END)
        assert await task == (0, END)

    with_events(use)


def test_what_comes_behind_something_that_was_not_taken_waits_behind_it() -> None:
    async def use(events: Events) -> None:
        reader = Reader(lambda event: event is not TWO)
        task = await waits(events, reader)
        for event in (ONE, TWO, THREE):  # in one round of the loop: the reader is still to be woken
            events.put(0, event)
        assert reader.passed == [ONE]
        assert await task == (0, TWO)
        assert await events.get(0.0, reader) == (0, THREE)

    with_events(use)


def test_nothing_is_passed_to_a_reader_that_does_not_wait() -> None:
    async def use(events: Events) -> None:
        reader = Reader()
        task = await waits(events, reader)
        events.put(0, END)  # takes it
        task.cancel()
        await asyncio.wait([task])
        events.put(0, ONE)
        assert reader.passed == [END]
        assert await events.get(0.0, reader) == (0, ONE)
        assert await events.get(0.0, reader) is None

    with_events(use)


def test_an_error_is_never_passed_on() -> None:
    async def use(events: Events) -> None:
        reader = Reader()
        task = await waits(events, reader)
        error = WorkerUnavailable("the worker is gone")
        events.put(1, error)
        assert await task == (1, error)
        assert reader.passed == []

    with_events(use)


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), ValueError("a mistake")], ids=repr)
def test_what_a_reader_fails_with_is_its_own(error: Exception) -> None:
    def fails(event: object) -> bool:
        raise error

    async def use(events: Events) -> None:
        task = await waits(events, Reader(fails))
        events.put(0, ONE)  # whoever brings it hears nothing of that
        assert await task == (0, error)

    with_events(use)
