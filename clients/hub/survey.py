"""What a model's folder holds and whether expertd can serve it, from its config and its files' headers alone.

No mlx, no weights, no network: fifty models in about a second.  So this is a forecast.  Which tensors are experts is
told by their names and shapes here; a worker asks mlx-lm itself and has the last word (``expertd.worker.manifest``).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from expertd.protocol.checkpoint import Header, Tensor, missing_files, read_header, weight_files
from expertd.protocol.errors import CheckpointError, StoreInvalid
from expertd.protocol.packed import SUFFIX
from expertd.protocol.packed import read_header as read_store_header
from expertd.protocol.paths import Home

EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
_TOP_K_FALLBACKS = ("experts_per_token", "num_selected_experts", "top_k")

_ONE_BY_ONE = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<part>.+)")
_STACKED = re.compile(r"(?P<layer>.+\.(?:switch_mlp|switch_glu|experts))\.(?P<part>[^.]+(?:\.[^.]+)?)")
_COMPUTED = re.compile(r"gate_up_proj|_blocks$|_scales$|weight_scale(_inv)?$|weight_packed$")
"""Parts that mlx-lm takes apart or computes while it loads."""


@dataclass
class Facts:
    """What is known of a model's folder.

    Attributes:
        size: bytes of its weight files.
        layers, experts, top_k: MoE layers, the experts of each, and how many a token uses; 0: none, or not known.
        expert_bytes, rest_bytes: of the tensors that are experts', and of the others; where only mlx-lm can tell the
            experts, all are others.
        why_not: why expertd cannot serve it, in words; empty if it can.
        pack_first: whether it can only once it is packed, and is not.
        packed: the packed store that fits it, if there is one.
    """

    name: str
    folder: Path
    size: int = 0
    family: str = ""
    layers: int = 0
    experts: int = 0
    top_k: int = 0
    expert_bytes: int = 0
    rest_bytes: int = 0
    why_not: str = ""
    pack_first: bool = False
    packed: Path | None = None

    @property
    def servable(self) -> bool:
        return not self.why_not

    def share(self, budget: int) -> float | None:
        """The part of its experts that ``budget`` bytes hold beside its other weights, at most 1; None if it has none.

        A budget that is too small for the others too is for experts alone.
        """
        if not self.expert_bytes:
            return None
        return min(1.0, (budget - self.rest_bytes if budget > self.rest_bytes else budget) / self.expert_bytes)


@dataclass
class Experts:
    """The expert tensors of a model: bytes in all, experts by layer, and whether some are computed at load."""

    bytes: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    computed: bool = False


def survey(folder: Path, name: str, stores: Iterable[Store] = ()) -> Facts:
    """Look at one folder.  What is wrong with it is in ``why_not``; nothing is raised for it.

    Args:
        stores: the packed stores that there are (``packed_stores``).
    """
    facts = Facts(name, folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        facts.family = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        config = {}
    try:
        headers = [read_header(path) for path in weight_files(folder) if path.exists()]
    except CheckpointError as error:
        facts.why_not = _no_weights(folder) or error.message
        return facts
    except OSError as error:
        facts.why_not = f"it cannot be read ({error.strerror})"
        return facts
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    facts.size = sum(header.mark.size for header in headers)
    found = experts_in(tensors, _number(config, EXPERTS_KEYS))
    facts.layers, facts.experts = len(found.layers), max(found.layers.values(), default=0)
    facts.top_k = _number(config, TOP_K_KEYS) or _number(config, _TOP_K_FALLBACKS) if found.layers else 0
    facts.expert_bytes = found.bytes
    facts.rest_bytes = sum(tensor.end - tensor.start for tensor in tensors.values()) - found.bytes
    facts.packed = next((store.path for store in stores if store.fits(folder, headers)), None)
    # Experts that the config tells of, and that are not found, are laid out in a way that mlx-lm takes apart.
    hidden = not found.layers and _number(config, EXPERTS_KEYS) > 1
    if hidden:
        facts.experts, facts.top_k = _number(config, EXPERTS_KEYS), _number(config, TOP_K_KEYS)
    facts.pack_first = (found.computed or hidden) and facts.packed is None
    facts.why_not = _why_not(folder, config, facts)
    return facts


def experts_in(tensors: Mapping[str, Tensor], experts: int) -> Experts:
    """Find the expert tensors among ``tensors``; ``experts``: of a layer, by the config; 0 if that is silent."""
    found = Experts()
    for name, tensor in tensors.items():
        one = _ONE_BY_ONE.fullmatch(name)
        stacked = None if one else _STACKED.fullmatch(name)
        if one is not None:
            layer, number, part = one["layer"], int(one["expert"]) + 1, one["part"]
            found.layers[layer] = max(found.layers.get(layer, 0), number)
        elif stacked is not None and len(tensor.shape) > 1 and tensor.shape[0] == (experts or tensor.shape[0]):
            layer, part = stacked["layer"], stacked["part"]
            found.layers[layer] = tensor.shape[0]
        else:
            continue
        found.bytes += tensor.end - tensor.start
        found.computed = found.computed or _COMPUTED.search(part.removesuffix(".weight")) is not None
    return found


# -- packed stores -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """A packed store, and of which files it was written: ``marks`` are their names, sizes, times and inodes."""

    path: Path
    folder: str
    marks: frozenset[tuple[str, int, int, int]]

    def fits(self, folder: Path, headers: Iterable[Header]) -> bool:
        """Whether it is of this folder as it is now."""
        now = {(mark.name, mark.size, mark.modified, mark.inode) for mark in (header.mark for header in headers)}
        return self.folder == str(folder.resolve()) and self.marks == now


def packed_stores(home: Home) -> list[Store]:
    """The packed stores of a home that can be read; others are left to the daemon's log."""
    stores = []
    for path in sorted(home.packed.glob(f"*{SUFFIX}")):
        try:
            header = read_store_header(path)
        except (StoreInvalid, FileNotFoundError):
            continue
        marks = frozenset((mark.name, mark.size, mark.modified, mark.inode) for mark in header.files)
        stores.append(Store(path, header.folder, marks))
    return stores


# -- what can be served ------------------------------------------------------------------------------------------------


def _why_not(folder: Path, config: Mapping[str, Any], facts: Facts) -> str:
    missing = missing_files(folder)
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"it is not complete: {missing[0]}{rest} missing"
    if not facts.family:
        return "its config.json names no model_type"
    families = mlx_families()
    if families and facts.family not in families and "model_file" not in config:
        return f"mlx-lm has no model of type '{facts.family}'"
    if not facts.experts:
        return "it is a dense model: it has no experts to cache"
    if "model_file" in config:
        return "it brings code of its own (model_file), which expertd does not run"
    return ""


def _no_weights(folder: Path) -> str:
    """Why a folder without ``model*.safetensors`` is of no use, if its files tell."""
    if next(folder.glob("*.gguf"), None) is not None:
        return "it is GGUF, and expertd reads safetensors"
    if not any(folder.glob("model*.safetensors")):
        others = next(folder.glob("*.safetensors"), None) is not None
        return "its weights are not in mlx-lm's layout (model*.safetensors)" if others else "its weights are not here"
    return ""


@cache
def mlx_families() -> frozenset[str]:
    """The types of models that the installed mlx-lm has, without importing it; empty if that cannot be told."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    package = Path(spec.submodule_search_locations[0])
    families = {path.stem for path in (package / "models").glob("*.py")}
    families |= {path.parent.name for path in (package / "models").glob("*/__init__.py")}
    return frozenset(families | set(_renamed(package / "utils.py")))


def _renamed(path: Path) -> list[str]:
    """The types that mlx-lm loads with the class of another one: the keys of its ``MODEL_REMAPPING``."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "MODEL_REMAPPING" for target in node.targets
            ):
                return [str(key) for key in ast.literal_eval(node.value)]
    except (OSError, ValueError, SyntaxError):
        return []
    return []


def _number(config: Mapping[str, Any], keys: Iterable[str]) -> int:
    """The first of ``keys`` that is a number in the config, or in the part of it that is the language model's."""
    for part in (config, config.get("text_config"), config.get("llm_config"), config.get("ffn_config")):
        if isinstance(part, Mapping):
            for key in keys:
                value = part.get(key)
                if isinstance(value, int) and value > 0:
                    return value
    return 0
