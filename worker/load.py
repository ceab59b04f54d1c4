"""``expertd.load``: a model whose experts are in the daemon's pools, and its base weights in shared memory too.

A drop-in for ``mlx_lm.load``.
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.generate import generation_stream
from mlx_lm.utils import load_tokenizer

from expertd.protocol.checkpoint import check_unchanged
from expertd.protocol.errors import AliasFailed, CheckpointError, ExpertdError, ReadFailed, SessionClosed
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.model_names import find_model
from expertd.protocol.paths import Home, expanded
from expertd.protocol.rendezvous import connect_or_start, stop_if_idle
from expertd.protocol.sizes import parse_budget
from expertd.worker import attach, sessions
from expertd.worker.alias import CopiedSlabs, Holdings, SharedBase, SharedSlabs, self_test
from expertd.worker.experts import CachedExperts, Events
from expertd.worker.manifest import LazyModel, load_lazily, replace_module
from expertd.worker.room import check_room
from expertd.worker.routers import foresee

log = logging.getLogger("expertd.worker")

Alias = Literal["auto", "shm", "copy"]


def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    home: Home | None = None,
    budget: str | None = None,
    alias: Alias = "auto",
) -> Any:
    """Load a model and its tokenizer as ``mlx_lm.load`` does, with its experts in the shared cache.

    Works with ``mlx_lm.generate``, ``stream_generate`` and ``BatchGenerator`` unchanged; starts a daemon if none runs.

    Args:
        path_or_hf_repo: the folder of a checkpoint, or the name of a model on this machine, as an id of the hub.
            Nothing is downloaded: see ``expertd.protocol.model_names``.
        tokenizer_config, model_config, lazy, return_config, trust_remote_code: as in ``mlx_lm.load``.
        adapter_path: stands here for the order of the arguments; it is not supported yet.
        revision: the version, where the name is an id of the hub.
        home: whose daemon to use, by default that of EXPERTD_HOME.
        budget: for a daemon that has to be started, for example ``"8GiB"`` or ``"auto"``.
        alias: ``"shm"`` computes out of the shared pages, ``"copy"`` out of a copy, ``"auto"`` tries the first.
    Returns:
        ``(model, tokenizer)``, and the config where asked for.
    Raises:
        ExpertdError: with a code for each reason (see ``expertd.protocol.errors``).
    """
    if adapter_path is not None:
        raise CheckpointError("expertd.load does not support adapters yet; give a folder that has them merged in")
    if budget is not None:
        parse_budget(budget)  # now, not when the model has been looked through
    sessions.end_forgotten()  # so that their memory is free
    home = home or Home.current()
    home.check()
    folder = find_model(path_or_hf_repo if revision is None else _at(path_or_hf_repo, revision), home)
    loaded = load_lazily(folder, model_config=model_config or {}, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, tokenizer_config or {}, eos_token_ids=loaded.config.get("eos_token_id"))
    mode = _mode(alias)
    connection, started = connect_or_start(home, "worker", budget=budget, announce=_announce)
    try:
        with connection:
            if not lazy:
                check_room(loaded, connection.ask(AskStatus(), Status).used_bytes)
        def start() -> None:
            connect_or_start(home, "worker", budget=budget, announce=_announce)[0].close()

        model = _attach(loaded, home, mode, start)
        if not lazy:
            _read_base(model, loaded.manifest)
            mx.clear_cache()  # what loading needed beside the weights
    except BaseException:
        if started:
            stop_if_idle(home, "worker")
        raise
    return (model, tokenizer, loaded.config) if return_config else (model, tokenizer)


def _at(name: str | Path, revision: str) -> str:
    if expanded(name).exists():
        raise CheckpointError(f"{name} is a folder, which has no revisions; leave 'revision' out")
    return f"{name}@{revision}"


def unload(model: Any) -> None:
    """Close the session of a model that ``load`` returned, and unmap its pools and base weights.

    Its calls raise SessionClosed then, and parameters that were shared are empty.  Where the program has kept a weight
    or a layer, the session stays, and the daemon counts its pages, until that has gone; where it has kept a view of a
    weight, or a result that was not evaluated by now, to the end of the process.
    """
    events = events_of(model)
    session = events.session
    session.stop()
    if session.forked:
        return  # nothing is mapped for us, and MLX does not work here
    if session.forwards:
        mx.synchronize()  # what is being computed reads the pages
        mx.synchronize(generation_stream)
    events.let_go()
    for module in model.modules():
        if isinstance(module, CachedExperts):
            module.let_go()
    if events.base_paths:
        model.update(tree_unflatten([(path, mx.zeros((0,))) for path in events.base_paths]))
    session.close()
    mx.clear_cache()


def session_of(model: Any) -> attach.Session:
    """The session of a model that ``load`` returned.

    Raises:
        SessionClosed: it is not such a model.
    """
    return events_of(model).session


def events_of(model: Any) -> Events:
    """What the layers of a model share that ``load`` returned.

    Raises:
        SessionClosed: it is not such a model.
    """
    events = getattr(model, "_expertd_events", None)
    if not isinstance(events, Events):
        raise SessionClosed("this model was not loaded by expertd.load")
    return events


def _read_base(model: Any, manifest: Manifest) -> None:
    """Read the weights that are neither experts' nor shared.

    MLX does that itself, so whether the files held still is asked after.

    And before: after reads that failed MLX may tell of another one later, in whatever is evaluated then, or even wait
    for ever (seen once in hundreds of times with MLX 0.32), so it had better not begin.

    Raises:
        ReadFailed: a file could not be read.
        FileChanged: a file is not the one whose header was read.
    """

    def check() -> None:
        for mark in manifest.files:
            check_unchanged(Path(manifest.folder) / mark.name, mark)

    try:
        check()
        try:
            mx.eval(model.parameters())
        finally:
            check()
    except RuntimeError as error:
        unload(model)
        raise ReadFailed(f"the weights in {manifest.folder} could not be read ({error}); try again") from error
    except ExpertdError:
        unload(model)
        raise


def _announce(sentence: str) -> None:
    print(f"expertd: {sentence}", file=sys.stderr)


def _mode(alias: Alias) -> Literal["shm", "copy"]:
    if alias == "copy":
        return "copy"
    problem = self_test()
    if problem is None:
        return "shm"
    if alias == "shm":
        raise AliasFailed(f"MLX cannot compute out of shared pages here ({problem}); use alias='copy'")
    log.warning("MLX cannot compute out of shared pages here (%s): this worker copies each block that it uses", problem)
    return "copy"


def _attach(loaded: LazyModel, home: Home, mode: Literal["shm", "copy"], start: Callable[[], None]) -> Any:
    """Open a session, and put what it shares in the place of the model's experts and base weights."""
    session = attach.Session(home, loaded.manifest, mode, start)
    holdings = Holdings()
    session.let_go = holdings.let_go
    try:
        base = session.take_base()
        if base is not None:
            shared = holdings.base = SharedBase(*base, loaded.manifest.base)
            arrays = [(path, shared.arrays[number]) for path, number in loaded.base.items()]
            loaded.model.update(tree_unflatten(arrays))
            shared.arrays.clear()  # the model has them
        events = Events(session, SharedSlabs if mode == "shm" else CopiedSlabs, holdings)
        for pool in session.pools:
            slabs = events.make_slabs(pool.mapping, pool.layout)
            events.slabs.append(slabs)
            for layer in pool.layers:
                switch = loaded.switches[layer]
                last = layer == len(loaded.switches) - 1
                foresight = foresee(loaded.model, loaded.manifest.layers[layer])
                stand_in = CachedExperts(events, layer, switch.module, pool, slabs, foresight, last=last)
                replace_module(loaded.model, switch.path, stand_in)
    except BaseException:
        session.close()
        raise
    model = loaded.model
    model.__class__ = _cached(type(model))
    model._expertd_events = events
    events.base_paths = () if base is None else tuple(loaded.base)
    events.model = weakref.ref(model)
    session.on_idle, session.on_close = _weakly(events.while_idle), _weakly(events.closing)
    # At exit it is close_all that ends sessions, because it waits for forwards.
    weakref.finalize(events, session.abandon).atexit = False
    return model


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """``method`` of a model's events, for a session that must not keep its own model alive."""
    held = weakref.WeakMethod(method)

    def call() -> None:
        alive = held()
        if alive is not None:
            alive()

    return call


def _cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache that a model is called with: all of mlx-lm's take it by name, or as the second argument."""
    return kwargs["cache"] if "cache" in kwargs else args[1] if len(args) > 1 else None


_classes: dict[type, type] = {}


def _cached(cls: type) -> type:
    """``cls`` with its call bracketed by the session.

    A subclass of the model's own class, because Python looks ``__call__`` up on the class, and callers may look at the
    class.
    """
    if cls not in _classes:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            events: Events = self._expertd_events
            events.session.begin()
            settled = False
            try:
                try:
                    events.begin_call()
                    inputs = args[0] if args else kwargs.get("inputs")
                    events.measure_call(single=getattr(inputs, "size", 0) == 1)
                    if events.recorder is not None:
                        events.recorder.begin(inputs, _cache_of(args, kwargs))
                    out = cls.__call__(self, *args, **kwargs)
                    if inputs is not None and inputs.ndim == 2:
                        events.session.computed(*inputs.shape)
                    if events.recorder is not None:
                        events.recorder.end()
                    return out
                finally:
                    events.settle()
                    settled = True
            finally:
                events.session.end(settled)

        names = {"__call__": call, "__module__": cls.__module__, "_expertd_plain": cls}
        _classes[cls] = type(cls.__name__, (cls,), names)
    return _classes[cls]


atexit.register(sessions.close_all)
