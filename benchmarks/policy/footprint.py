"""What an object keeps in memory, all that it refers to included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def things_of(root: object) -> Iterator[object]:
    """Everything that ``root`` holds, each once; of views that on which they look."""
    seen: set[int] = set()
    todo: list[object] = [root]
    while todo:
        thing = todo.pop()
        if isinstance(thing, np.ndarray) and isinstance(thing.base, np.ndarray):
            thing = thing.base
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, dict):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            todo += thing
        elif hasattr(thing, "__dict__"):
            todo.append(vars(thing))


def arrays_of(root: object) -> list[NDArray[Any]]:
    return [thing for thing in things_of(root) if isinstance(thing, np.ndarray)]


def bytes_of_arrays(root: object) -> int:
    """Bytes of all arrays that ``root`` holds."""
    return sum(array.nbytes for array in arrays_of(root))
