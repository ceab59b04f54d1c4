"""Metal's wired limit: how much of this process's memory the system keeps resident for the GPU.

Without a limit nothing is wired, and under memory pressure the GPU driver may bring the machine down (mlx#3186).
mlx-lm's generators wire all that is recommended, which on a machine with other apps is more than a worker needs.
"""

from __future__ import annotations

import logging
from typing import Any

from expertd.protocol.sizes import show_size

__all__ = ["HEADROOM", "WiredLimit"]

log = logging.getLogger(__name__)

HEADROOM = 2 << 30
"""For what comes on top of a loaded model, in bytes: the caches of its requests, and what a step computes with."""


class WiredLimit:
    """Held from the first ``hold`` to ``release``; without Metal, both do nothing.  Nothing may run meanwhile."""

    def __init__(self, mlx: Any) -> None:
        """``mlx`` is ``mlx.core``, or what stands for it in a test."""
        self._mlx = mlx
        self._limit: int | None = None
        self._former: int | None = None
        self._given_up = False

    def hold(self) -> None:
        """Set the limit to what is in use at the first call, and ``HEADROOM``, but to no more than is recommended.

        A later call sets the same again, because mlx-lm's generators set their own.
        """
        if self._given_up or not self._mlx.metal.is_available():
            return
        try:
            if self._limit is None:
                recommended = int(self._mlx.device_info()["max_recommended_working_set_size"])
                self._limit = min(int(self._mlx.get_active_memory()) + HEADROOM, recommended)
            former = self._mlx.set_wired_limit(self._limit)
        except Exception as error:  # whatever the driver has against it: the model runs without
            self._given_up = True
            log.warning("the wired limit could not be set (%s)", error)
            return
        if self._former is None:
            self._former = former
            log.info("the wired limit is %s", show_size(self._limit))

    def release(self) -> None:
        """Set back what was before."""
        former, self._former = self._former, None
        if former is None:
            return
        try:
            self._mlx.set_wired_limit(former)
        except Exception as error:
            log.warning("the wired limit could not be set back (%s)", error)
