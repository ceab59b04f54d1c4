"""Load a model without its weights, and find out which bytes of which files its experts and base weights are.

mlx-lm's own ``sanitize`` decides what a checkpoint's tensors become: it renames, stacks, and sometimes computes.  So it
runs here on lazy arrays, and each tensor of the finished model is traced back to the file by object identity (with
``mx.stack`` followed), confirmed by its graph: an expert tensor that is anything but a plain load, or a stack of plain
loads, is *derived*: its bytes are in no file but a packed store (``expertd.worker.computed``).  A base weight that is
not a plain load is no part of the manifest: each worker keeps its own.  No model family is known by name.

Attaching to the daemon is ``expertd.worker.attach``; putting the pieces together is ``expertd.worker.load``.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import get_ident
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model

from expertd.protocol.checkpoint import Header, check_unchanged, read_header, weight_files
from expertd.protocol.errors import CheckpointError, ConfigMissing, DenseModel, DerivedExperts, UnknownFamily
from expertd.protocol.manifest import BaseTensor, Layer, Manifest, Part
from expertd.worker.dtypes import SAFETENSORS_NAME

Origin = tuple[tuple[int, str], ...]
"""Where an array came from: (file number, tensor name), once, or once for each expert that was stacked."""

_hooking = threading.Lock()


@dataclass(frozen=True)
class Switch:
    """One MoE layer of a model: the module that computes its experts, and its path in the model."""

    path: str
    module: Any


@dataclass(frozen=True)
class LazyModel:
    """A model whose weights nobody has read yet, its config, and its manifest.

    ``switches`` are those of the manifest's layers, in their order; ``base`` has the place in ``manifest.base`` of each
    parameter, by its path in the model, whose tensor is there.
    """

    model: Any
    config: dict[str, Any]
    manifest: Manifest
    switches: tuple[Switch, ...]
    base: dict[str, int]


def load_lazily(folder: Path, **options: Any) -> LazyModel:
    """Build the model in ``folder`` as ``mlx_lm.load`` does, reading headers only.

    Args:
        options: ``model_config`` and ``trust_remote_code`` of ``mlx_lm.utils.load_model``.
    Raises:
        CheckpointError: one of its kinds, for each way in which a checkpoint can be unusable.
    """
    files = weight_files(folder)
    family = _family(folder)
    headers = [_read_header(path) for path in files]
    with _tracing(files) as (origins, kept):
        try:
            model, config = load_model(folder, lazy=True, **options)
        except ValueError as error:
            if "not supported" in str(error):
                raise UnknownFamily(f"{folder}: mlx-lm has no model of type '{family}'") from error
            raise CheckpointError(f"{folder} cannot be loaded by mlx-lm: {error}") from error
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{folder} cannot be loaded by mlx-lm: {type(error).__name__} {error}") from error
        for header in headers:
            check_unchanged(header.path, header.mark)
        switches = find_switches(model)
        if not switches:
            raise DenseModel(f"{folder} is a dense model ({family}): it has no experts to cache; use mlx_lm itself")
        ran = _probe(model, switches)
        layers = tuple(_layer(folder, switch, top_k, origins, headers) for switch, top_k in ran)
        base, of_parameter = _base(model, switches, origins, headers)
        kept.clear()
    derived = any(not part.tensors for layer in layers for part in layer.parts)
    derived_by = f"mlx-lm {version('mlx-lm')}" if derived else ""
    manifest = Manifest(str(folder), family, tuple(header.mark for header in headers), layers, derived_by, base)
    return LazyModel(model, config, manifest, tuple(switch for switch, _ in ran), of_parameter)


def find_switches(model: Any) -> list[Switch]:
    """Every module of ``model`` that computes experts, wherever its family keeps it."""
    return [Switch(path, m) for path, m in model.named_modules() if isinstance(m, SwitchGLU | SwitchMLP)]


def replace_module(model: Any, path: str, module: Any) -> None:
    """Put ``module`` at ``path`` of ``model``."""
    model.update_modules(tree_unflatten([(path, module)]))


def expert_tensors(switch: Any) -> list[tuple[str, Any]]:
    """``(name, array)`` of the tensors of ``switch`` that have an expert axis, sorted by name."""
    first = switch.gate_proj if isinstance(switch, SwitchGLU) else switch.fc1
    experts = first.num_experts
    found = tree_flatten(switch.parameters())
    return sorted(((n, a) for n, a in found if a.ndim and a.shape[0] == experts), key=lambda item: str(item[0]))


def _family(folder: Path) -> str:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigMissing(f"{folder} has no config.json, so it is no mlx-lm checkpoint") from error
    except (OSError, ValueError) as error:
        raise ConfigMissing(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigMissing(f"{path} names no model_type, so it is no mlx-lm checkpoint")
    return str(config["model_type"])


def _read_header(path: Path) -> Header:
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


@contextmanager
def _tracing(files: Sequence[Path]) -> Iterator[tuple[dict[int, Origin], list[Any]]]:
    """Follow arrays from ``mx.load`` of ``files`` through ``mx.stack``, by identity.

    Yields the origins by ``id`` and a list that keeps the traced arrays alive, without which an id could come to name
    another array.  mlx-lm looks both functions up in the module ``mlx.core`` at each call, so that is where they are
    replaced; the lock keeps two loads in one process from replacing each other's.  What other threads call meanwhile,
    and what is loaded from elsewhere, goes through as it is.
    """
    numbers = {_place(path): number for number, path in enumerate(files)}
    loader = get_ident()
    origins: dict[int, Origin] = {}
    kept: list[Any] = []
    mlx: Any = mx
    plain_load, plain_stack = mlx.load, mlx.stack

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = plain_load(file, *args, **kwargs)
        if get_ident() != loader or not isinstance(file, str | Path):
            return loaded
        number = numbers.get(_place(Path(file)))
        if number is not None:
            arrays: dict[str, Any] = loaded[0] if isinstance(loaded, tuple) else loaded
            for name, array in arrays.items():
                origins[id(array)] = ((number, name),)
                kept.append(array)
        return loaded

    def stack(arrays: Sequence[Any], axis: int = 0, **kwargs: Any) -> Any:
        stacked = plain_stack(arrays, axis, **kwargs)
        if get_ident() != loader:
            return stacked
        found = [origins.get(id(array), ()) for array in arrays]
        if axis == 0 and all(len(origin) == 1 for origin in found):
            origins[id(stacked)] = tuple(origin[0] for origin in found)
            kept.append(stacked)
        return stacked

    with _hooking:
        mlx.load, mlx.stack = load, stack
        try:
            yield origins, kept
        finally:
            mlx.load, mlx.stack = plain_load, plain_stack


def _place(path: Path) -> Path:
    """One name for a file, by whatever way its folder was reached; in a hub's cache several may lead to one file."""
    return path.parent.resolve() / path.name


class _Probe(nn.Module):  # type: ignore[misc]
    """Stands in for a switch: notes how many experts a token uses, and gives zeros of the right shape."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __call__(self, x: Any, indices: Any) -> Any:
        self._note(indices.shape[-1])
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)


def _probe(model: Any, switches: Sequence[Switch]) -> list[tuple[Switch, int]]:
    """The switches in the order in which a forward pass runs them, each with its number of experts a token.

    One forward of one token is built and never evaluated, so nothing is read and nothing computed.
    """
    ran: list[tuple[Switch, int]] = []
    for switch in switches:
        replace_module(model, switch.path, _Probe(lambda top_k, switch=switch: ran.append((switch, top_k))))
    try:
        model(mx.zeros((1, 1), mx.uint32), cache=make_prompt_cache(model))
    finally:
        for switch in switches:
            replace_module(model, switch.path, switch.module)
    return ran


def _layer(
    folder: Path, switch: Switch, top_k: int, origins: dict[int, Origin], headers: Sequence[Header]
) -> Layer:
    parts = []
    experts = 0
    for name, array in expert_tensors(switch.module):
        experts = array.shape[0]
        dtype, shape = SAFETENSORS_NAME.get(array.dtype), tuple(array.shape[1:])
        if dtype is None:
            raise DerivedExperts(f"{folder}: mlx-lm makes {switch.path}.{name} {array.dtype}, which pools cannot hold")
        origin = origins.get(id(array), ())
        if not _is_plain(array, len(origin)) or headers[origin[0][0]].tensors[origin[0][1]].dtype != dtype:
            origin = ()  # computed, or read as another type
        parts.append(Part(name, dtype, shape, tuple(tensor for _, tensor in origin), tuple(file for file, _ in origin)))
    return Layer(switch.path, experts, top_k, tuple(parts))


def _base(
    model: Any, switches: Sequence[Switch], origins: dict[int, Origin], headers: Sequence[Header]
) -> tuple[tuple[BaseTensor, ...], dict[str, int]]:
    """The files' tensors that are parameters of ``model`` outside its ``switches``, and which parameter is which.

    One tensor may be several parameters.  They are in the order of their bytes, so that reading them is one sweep.
    """
    experts = tuple(f"{switch.path}." for switch in switches)
    paths: dict[tuple[int, str], list[str]] = {}
    for path, array in tree_flatten(model.parameters()):
        origin = origins.get(id(array), ())
        if path.startswith(experts) or len(origin) != 1 or not array.size or not _is_plain(array, 1):
            continue
        file, name = origin[0]
        tensor = headers[file].tensors[name]
        if SAFETENSORS_NAME.get(array.dtype) == tensor.dtype and tuple(array.shape) == tensor.shape:
            paths.setdefault((file, name), []).append(path)
    ordered = sorted(paths, key=lambda place: (place[0], headers[place[0]].tensors[place[1]].start))
    base = []
    for file, name in ordered:
        tensor = headers[file].tensors[name]
        base.append(BaseTensor(name, file, tensor.dtype, tensor.shape))
    return tuple(base), {path: number for number, place in enumerate(ordered) for path in paths[place]}


def _is_plain(array: Any, loads: int) -> bool:
    """Whether the graph of ``array`` is one load, or a stack of ``loads`` loads.

    Identity alone does not tell: ``w += 1`` keeps the Python object and changes what it stands for.
    """
    if not loads:
        return False
    text = io.StringIO()
    mx.export_to_dot(text, array)
    labels = [piece.split('"')[0] for piece in text.getvalue().split('label ="')[1:]]
    rest = set(labels) - {"Load"}
    return labels.count("Load") == loads and rest <= ({"ExpandDims", "Concatenate"} if loads > 1 else set())
