"""Which part may import which, read off the source of every module; and the public names of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import expertd

ROOT = Path(__file__).parents[1]

ALLOWED = {
    "expertd": {"expertd", "protocol"},
    "protocol": {"protocol"},
    "daemon": {"daemon", "protocol"},
    "worker": {"worker", "protocol"},
    "clients": {"clients", "protocol"},
    "launchd": {"launchd", "protocol"},
}
"""The parts that each part may import, by folder."""

INSIDE_FUNCTIONS = {"expertd": {"worker"}, "clients/cli": {"daemon", "worker", "launchd", "expertd"}}
"""What may be imported beyond that, but only when a function runs."""

PURE = ("daemon/core/", "daemon/policy/")
NO_OUTSIDE_WORLD = {"asyncio", "socket", "threading", "time", "os", "zmq", "mmap", "random", "subprocess", "logging"}

MODULES = sorted(path for part in ALLOWED for path in (ROOT / part).rglob("*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in MODULES]


def _part(module: str) -> str | None:
    """The part of expertd that an imported module belongs to, or None if it is no module of ours."""
    names = module.split(".")
    if names[0] in ALLOWED and names[0] != "expertd":
        return f"{module}, not through the package expertd"
    if names[0] in ("tests", "tools", "benchmarks"):
        return names[0]
    if names[0] != "expertd":
        return None
    return names[1] if len(names) > 1 and names[1] in ALLOWED else "expertd"


def _for_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _imports(path: Path) -> list[tuple[str, int, bool]]:
    """``(module, line, inside a function or for types only)`` of every import in ``path``."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((name.name, node.lineno, inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            found.extend((f"{node.module}.{name.name}", node.lineno, inside) for name in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            found.extend((str(name.value), node.lineno, inside) for name in node.args if isinstance(name, ast.Constant))
        here = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        here = here or (isinstance(node, ast.If) and _for_types(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or here)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_module_imports_only_what_its_part_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    allowed = ALLOWED[name.split("/")[0]]
    inside = {part for folder, parts in INSIDE_FUNCTIONS.items() if name.startswith(folder + "/") for part in parts}
    wrong = [
        f"line {line}: {module}"
        for module, line, in_function in _imports(path)
        if (part := _part(module)) is not None and part not in (allowed | inside if in_function else allowed)
    ]
    assert not wrong, f"{name} imports what it may not: {wrong}"


@pytest.mark.parametrize("name", [name for name in IDS if name.startswith(PURE)])
def test_core_and_policies_touch_nothing_outside_themselves(name: str) -> None:
    wrong = [module for module, _, _ in _imports(ROOT / name) if module.split(".")[0] in NO_OUTSIDE_WORLD]
    assert not wrong


@pytest.mark.parametrize("part", ["protocol", "daemon", "clients", "launchd"])
def test_only_the_worker_imports_mlx_at_the_top_of_a_module(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / part).rglob("*.py"))
        for module, line, in_function in _imports(path)
        if module.split(".")[0] in ("mlx", "mlx_lm") and not in_function
    ]
    assert not wrong


def test_the_public_names_are_these() -> None:
    assert sorted(expertd.__all__) == ["ExpertdError", "__version__", "load", "unload"]


def test_the_version_is_the_installed_package_s() -> None:
    from importlib.metadata import version

    assert expertd.__version__ == version("expertd")


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = expertd.nonsense
