"""``python -m benchmarks NAME [MODEL] [--quick] [--json FILE] ...``, from the repository's root: run one benchmark.

Each benchmark is a module with ``run(quick) -> dict`` of named figures; it prints a table as it goes.  The other
options are for the benchmarks whose ``run`` has an argument of that name: ``minutes``, ``model``, ``trace``,
``sequences``, ``picture``, ``fit``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import benchmarks


def names() -> list[str]:
    """The benchmarks: modules of this folder that can be run."""
    found = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    return [name for name in found if not name.startswith("_")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=names())
    parser.add_argument("model", type=Path, nargs="?", help="folder of a checkpoint, for a benchmark that takes one")
    parser.add_argument("--quick", action="store_true", help="a version that ends within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one flat object")
    parser.add_argument("--minutes", type=float, metavar="N", help="how long, for a benchmark that can be told")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="recorded routing, for a benchmark that replays it")
    parser.add_argument("--sequences", choices=["even", "odd", "all"], help="which of its sequences")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to draw the figures")
    parser.add_argument("--fit", action="store_true", default=None, help="fit the weights of a policy instead")
    arguments = parser.parse_args()
    run = importlib.import_module(f"benchmarks.{arguments.name}").run
    options = {"quick": arguments.quick}
    for option in ("minutes", "model", "trace", "sequences", "picture", "fit"):
        value = getattr(arguments, option)
        if value is not None:
            if option not in inspect.signature(run).parameters:
                parser.error(f"{arguments.name} takes no {option}")
            options[option] = value
    figures = run(**options)
    width = max(len(name) for name in figures)
    print()
    for name, figure in figures.items():
        print(f"{name:<{width}}  {figure}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
