"""The router beside each switch, found by its shape: listened to for its scores, and asked what it would choose.

mlx-lm's layers hand their switch the ids of the chosen experts only.  What the router thought of the others is the
output of a linear layer with one row an expert, somewhere in the same block; it is found here for any family, and
whether its scores explain the choice is measured where they are ranked (``expertd.worker.packing``).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from expertd.protocol.manifest import Layer

NAMES = {"gate", "router", "gating", "moe_gate", "wg"}
"""What routers are called, at the beginning of their path in the block."""
BIASES = ("e_score_correction_bias", "expert_bias", "correction_bias", "moe_statics")
"""Weights that some routers add to the sigmoid of a score before they choose."""


class Witness:
    """Listens to one router: ``scores()`` is what it thought of every expert in its last call.

    The router's class is replaced by a subclass of it, so that the model's tree of modules and weights stays as it is.

    Attributes:
        computes: whether ``scores`` are computed for the recording only; otherwise they are on the way to the choice.
        bias: what the router adds to the sigmoid of a score before it chooses, None for nothing.
    """

    def __init__(self, router: Any, bias: Any | None) -> None:
        self.bias = bias
        self._router = router
        self._class = type(router)
        self._seen: Any = None
        # A router that is its own linear layer (deepseek's MoEGate) returns its choice only.
        self.computes = computes = not isinstance(router, nn.Linear | nn.QuantizedLinear)
        cls = self._class

        def call(module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            out = cls.__call__(module, x, *args, **kwargs)
            self._seen = x if computes else out
            return out

        self._listening = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
        self.listen()

    def scores(self) -> Any | None:
        """The router's scores ``[..., experts]`` in its last call, not evaluated; None if it has not been called."""
        seen, self._seen = self._seen, None
        return seen @ self._router.weight.T if self.computes and seen is not None else seen

    def listen(self) -> None:
        """Listen to the router's calls, as it does from the beginning, until ``leave``."""
        self._router.__class__ = self._listening

    def leave(self) -> None:
        """Let the router be what it was."""
        if type(self._router) is self._listening:
            self._router.__class__ = self._class


class Foresight:
    """What a router would choose if it were given the input of an earlier layer's switch.

    What flows through a model changes little from layer to layer, so that is a good guess.
    """

    def __init__(self, router: Any, bias: Any | None, top_k: int) -> None:
        """``top_k``: how many experts the router chooses for a token."""
        self._router, self._bias, self._top_k = router, bias, top_k
        self._class = type(router)  # nobody listens to what is asked here

    def takes(self, x: Any) -> bool:
        """Whether ``x`` is as wide as what the router is given: some switches work on a projection of that."""
        weight = self._router.weight
        width = weight.shape[-1]
        if isinstance(self._router, nn.QuantizedLinear):
            width = width * 32 // self._router.bits
        return bool(x.shape[-1] == width)

    def __call__(self, x: Any) -> Any:
        """Ids ``[..., top_k]`` for ``x[..., hidden]``, which it ``takes``; not evaluated."""
        if isinstance(self._router, nn.Linear | nn.QuantizedLinear):
            scores = self._class.__call__(self._router, x)
        else:
            scores = x @ self._router.weight.T
        if self._bias is not None:
            scores = mx.sigmoid(scores) + self._bias
        return mx.argpartition(-scores, kth=self._top_k - 1, axis=-1)[..., : self._top_k]


def foresee(model: Any, layer: Layer) -> Foresight | None:
    """A guess at what the router of ``layer`` will choose, None if it is not known where that is."""
    found = find_router(model, layer.path, layer.experts)
    return None if found is None else Foresight(*found, layer.top_k)


def find_router(model: Any, path: str, experts: int) -> tuple[Any, Any | None] | None:
    """The router of the switch at ``path`` in ``model``, and its bias (``_bias``); None if none is known as one."""
    *above, _ = path.split(".")
    block = model
    for step in above:
        block = block[int(step)] if isinstance(block, list) else getattr(block, step)
    for name, module in block.named_modules():
        weight = module.get("weight") if isinstance(module, dict) else None
        if (
            name.split(".")[0] in NAMES
            and isinstance(weight, mx.array)
            and weight.ndim == 2
            and weight.shape[0] == experts
        ):
            return module, _bias(block, name, experts)
    return None


def _bias(block: Any, name: str, experts: int) -> Any | None:
    """The bias by which the router ``name`` of ``block`` chooses, in it or in the modules above."""
    holders = [block]
    for step in name.split("."):
        holders.append(getattr(holders[-1], step))
    for holder in holders:
        for bias in BIASES:
            found = holder.get(bias)
            if isinstance(found, mx.array) and found.shape == (experts,):
                return found
    return None
