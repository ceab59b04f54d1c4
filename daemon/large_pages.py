"""Puts the memory of pools together into large pages, in the background.  The difference between systems.

A direct read into pages of 4 KiB that lie apart is taken to pieces for the device; into pages of 2 MiB it is not.
Linux: MADV_COLLAPSE (madvise(2), since 6.1), which works for shared memory whatever the system's setting of large pages
is, and for pages that others read and write meanwhile.  Elsewhere: nothing is done.

This does not decide where a pool's memory is or who maps it (``expertd.protocol.segments``), and nothing depends on its
success.  How short of memory the machine is, somebody else tells.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from expertd.protocol.sizes import show_size

log = logging.getLogger("expertd.daemon")

PIECE = 2 << 20
"""A large page where pages have 4 KiB; a system with others refuses, and its pools stay as they are."""
SMALLEST = 64 << 20
"""A pool below this is read in less time than it takes to care."""
SHORT_S = 1.0
"""How often somebody asks whether the machine is still short of memory."""

Collapse = Callable[[int, int], int]
"""Puts the piece of a segment (descriptor, offset) together; 0, or the error number with which that was refused.

It MUST leave the contents as they are for those who read and write them meanwhile, and MUST NOT keep the piece mapped.
"""

_BUSY = (errno.EAGAIN, errno.EBUSY)  # a direct read is writing to a page of it: another time it may succeed
_PROT_NONE, _MAP_FIXED, _MADV_COLLAPSE = 0, 0x10, 25  # asm-generic/mman-common.h; Python's mmap does not have them


class Window:
    """Linux's ``Collapse``: address space of one piece, into which one after another is mapped.

    A piece is only put together through a mapping whose address has the alignment of its offset, which Python's mmap
    does not give.  And what is mapped here for an instant only is not counted as the daemon's memory a second time.

    Raises:
        OSError: when it is made: there is no address space.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._library.mmap.restype = address
        self._library.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
        self._library.madvise.argtypes = [address, size, number]
        base = self._map(None, 2 * PIECE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._at = (base + PIECE - 1) // PIECE * PIECE  # for as long as the process lives; no memory is behind it

    def __call__(self, descriptor: int, offset: int) -> int:
        """See ``Collapse``.  Reading is all that ``descriptor`` has to allow."""
        try:
            self._map(self._at, PIECE, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, offset)
            refused = ctypes.get_errno() if self._library.madvise(self._at, PIECE, _MADV_COLLAPSE) else 0
            # Else the memory of a pool that is given back would stay until the next piece.
            self._map(self._at, PIECE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED)
        except OSError as error:
            return error.errno or errno.EINVAL
        return refused

    def _map(self, at: int | None, size: int, access: int, flags: int, descriptor: int = -1, offset: int = 0) -> int:
        address: int | None = self._library.mmap(at, size, access, flags, descriptor, offset)
        if address is None or address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return address


def system_collapse() -> Collapse | None:
    """What puts pieces together on this system; None: it cannot.  Never fails."""
    if sys.platform != "linux":
        return None
    try:
        return Window()
    except (OSError, AttributeError) as error:
        log.debug("pools stay in small pages: %s", error)
        return None


@dataclass(frozen=True)
class _Pool:
    key: int
    descriptor: int  # our own
    size: int


class LargePages:
    """One thread, which puts one pool together after another.  Any thread may call; only ``close`` waits."""

    def __init__(self, collapse: Collapse | None, short: Callable[[], bool]) -> None:
        """Idle, and for ever so if ``collapse`` is None.

        Args:
            short: whether the machine is short of memory; asked before each piece, by the thread.
        """
        self._collapse, self._short = collapse, short
        self._changed = threading.Condition()
        self._waiting: dict[int, _Pool] = {}  # by key, first come first served
        self._current: int | None = None  # the key of what the thread works on; another value: it is to stop
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a pool is put together, or waits for that."""
        with self._changed:
            return bool(self._waiting) or self._current is not None

    def gather(self, key: int, descriptor: int, size: int) -> None:
        """Put the segment behind ``descriptor`` together, sooner or later; the caller may close its descriptor.

        ``key`` is the caller's name for it, which no other segment has.
        """
        if self._collapse is None or size < SMALLEST:
            return
        with self._changed:
            if self._closed:
                return
            try:
                self._waiting[key] = _Pool(key, os.dup(descriptor), size)
            except OSError as error:
                log.debug("a pool stays in small pages: %s", error)
                return
            self._changed.notify_all()
            if self._thread is None:
                work = (self._collapse,)
                self._thread = threading.Thread(target=self._run, args=work, name="large pages", daemon=True)
                self._thread.start()

    def forget(self, key: int) -> None:
        """The pool is given back: nothing here holds it any longer than it takes to finish a piece."""
        with self._changed:
            pool = self._waiting.pop(key, None)
            if pool is not None:
                os.close(pool.descriptor)
            elif self._current == key:
                self._current = None
                self._changed.notify_all()

    def close(self) -> None:
        """Forget all pools, and wait for the end of the thread."""
        with self._changed:
            self._closed = True
            self._current = None
            for pool in self._waiting.values():
                os.close(pool.descriptor)
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self, collapse: Collapse) -> None:
        while (pool := self._next()) is not None:
            try:
                self._put_together(pool, collapse)
            finally:
                os.close(pool.descriptor)

    def _next(self) -> _Pool | None:
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._current = next(iter(self._waiting))
            return self._waiting.pop(self._current)

    def _put_together(self, pool: _Pool, collapse: Collapse) -> None:
        offsets = range(0, pool.size - PIECE + 1, PIECE)
        left = list(offsets)
        for _ in range(2):  # what is busy has a second chance at the end
            refused = []
            for offset in left:
                if not self._wanted(pool.key):
                    return
                began = time.monotonic()
                error = collapse(pool.descriptor, offset)
                if error in _BUSY:
                    refused.append(offset)
                elif error:
                    log.debug("a pool of %s stays in small pages: %s", show_size(pool.size), os.strerror(error))
                    return
                self._rest(pool.key, time.monotonic() - began)  # half of a processor at most
            left = refused
        share = 1 - len(left) / len(offsets)
        log.debug("a pool of %s lies in large pages (%.0f %%)", show_size(pool.size), 100 * share)

    def _wanted(self, key: int) -> bool:
        """Whether to go on; if the machine is short of memory that is known only when it is no more."""
        while self._current == key and self._short():
            self._rest(key, SHORT_S)
        return self._current == key

    def _rest(self, key: int, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._current != key, seconds)
