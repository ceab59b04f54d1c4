"""A user's program in a process of its own: loads a model, then generates each time it is told to.

    python -m tests.programs MODEL [BUDGET]

Reads lines ``N`` (how many greedy tokens) and answers each with one line of JSON: the tokens, or the code of the error.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import DEADLINE_S


class Program:
    """The parent's end.  ``ask`` sends a job, ``answer`` waits for what came of it."""

    def __init__(self, model: Path, budget: int | None = None) -> None:
        command = [sys.executable, "-m", "tests.programs", str(model), *([] if budget is None else [str(budget)])]
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=root
        )
        self.pid = self.process.pid

    def ask(self, tokens: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens}\n".encode())
        self.process.stdin.flush()

    def answer(self, timeout_s: float = 2 * DEADLINE_S) -> Any:
        """The tokens, or ``{"error": code}``."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert readable, f"process {self.pid} has said nothing for {timeout_s} s"
        return json.loads(self.process.stdout.readline())

    def run(self, tokens: int) -> Any:
        self.ask(tokens)
        return self.answer()

    def __enter__(self) -> Program:
        assert self.answer() == "loaded"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    import expertd

    model, _ = expertd.load(sys.argv[1], budget=sys.argv[2] if len(sys.argv) > 2 else None)
    print(json.dumps("loaded"), flush=True)
    for line in sys.stdin:
        try:
            steps = generate_step(mx.arange(3, 20), model, max_tokens=int(line))
            said: Any = [int(token) for token, _ in steps]
        except expertd.ExpertdError as error:
            said = {"error": error.code}
        print(json.dumps(said), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
