"""One warm cache of Mixture-of-Experts weights for every app on the machine.

``load`` is a drop-in for ``mlx_lm.load``: the model computes out of memory that the cache daemon fills and shares, and
its tokens are exactly those of plain mlx-lm.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which takes longer to import than "expertd status" should
if TYPE_CHECKING:
    from typing import Any

    from expertd.protocol.errors import ExpertdError as ExpertdError
    from expertd.worker.load import load as load
    from expertd.worker.load import unload as unload

__all__ = ["ExpertdError", "__version__", "load", "unload"]


def __getattr__(name: str) -> Any:
    # Late, because daemon, gateway and command line import this package and must not import mlx.
    if name in ("load", "unload"):
        import importlib

        return getattr(importlib.import_module("expertd.worker.load"), name)
    if name == "ExpertdError":
        from expertd.protocol.errors import ExpertdError

        return ExpertdError
    if name == "__version__":
        from expertd.protocol import VERSION

        return VERSION
    raise AttributeError(f"module 'expertd' has no attribute '{name}'")
