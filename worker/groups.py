"""In which groups the blocks of one event are fetched and computed.  Pure.

What is resident is computed while the first absent blocks are read, these while the next are read, and so on; so a long
event takes the longer of its reading and its computing, and not both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUPS = 4
"""So many groups of absent blocks: what is left to compute when the last has come is a small part, and each group costs
a message and a few kernels more."""

Experts = NDArray[np.integer]


def plan_groups(wanted: Experts, resident: NDArray[np.bool_], room: int, overlap: bool) -> list[Experts]:
    """Divide the experts ``wanted``, ``[n]``, of which some are ``resident``, ``[n]``, into groups.

    Args:
        room: slots of the pool.
        overlap: a group is to be read while another one is computed; otherwise there are as few groups as fit.
    Returns:
        The groups in their order, resident blocks first, none with more than ``room`` blocks; with ``overlap`` with
        more than half of that, unless they fit together.
    """
    if not overlap:
        if len(wanted) <= room:
            return [wanted]
        order = np.concatenate((wanted[resident], wanted[~resident]))
        return [order[start : start + room] for start in range(0, len(order), room)]
    most = room if len(wanted) <= room // 2 else max(1, room // 2)
    here, absent = wanted[resident], wanted[~resident]
    return [*_divide(here, -(-len(here) // most)), *_divide(absent, max(GROUPS, -(-len(absent) // most)))]


def _divide(experts: Experts, groups: int) -> list[Experts]:
    return np.array_split(experts, min(groups, len(experts))) if len(experts) else []
