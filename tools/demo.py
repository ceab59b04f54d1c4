"""``make demo``: a model whose experts do not fit the budget, served to two clients at once, checked against mlx-lm.

Everything happens in a throw-away home; at the end nothing is left, and that is checked too.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from expertd.clients.planning.shape import read_shape
from expertd.clients.terminal.screens import screen
from expertd.protocol.checkpoint import weight_files
from expertd.protocol.sizes import show_size
from tools.stage import ask_status, running_daemon, temporary_home

QUESTIONS = ("What does os.path.join do?", "Write the function clamp: Limit x to the range from low to high.")
SHARE = 0.4
DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--large", action="store_true", help="a random checkpoint with about 1.3 GB of experts")
    arguments = parser.parse_args()
    began = time.monotonic()
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        if arguments.large:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="expertd-model-"))
            model, tokens = large_checkpoint(Path(folder)), 32
        else:
            model, tokens = DEMO_MODEL, 96
        experts = expert_bytes(model)
        budget = budget_of(model, SHARE)
        total = sum(path.stat().st_size for path in weight_files(model))
        say(f"model {model.name}: {show_size(total)}, of which {show_size(experts)} are experts")
        say(f"daemon with a budget of {show_size(budget)} (base weights, and {SHARE:.0%} of the experts)")
        with running_daemon(home, budget) as daemon:
            say(f"expertd serve {model.name}")
            with Gateway(model) as gateway:
                say(f"two chats at once, from two client processes, at {gateway.url}\n")
                answers = chat_at_once(gateway.url, model.name, tokens)
                say("expertd status\n")
                print("\n".join(screen(ask_status(home))), "\n", flush=True)
            say("the gateway and its worker have ended; now the same questions to plain mlx-lm")
            equal = [plain == answer for plain, answer in zip(plain_answers(model, tokens), answers, strict=True)]
        for question, same in zip(QUESTIONS, equal, strict=True):
            print(f"  {'the same text' if same else 'ANOTHER TEXT'}: {question}")
        say("the daemon has ended")
        gone = [daemon.pid, gateway.pid]
    left = left_behind(home.root, gone)
    say(f"left behind: {', '.join(left) or 'nothing'} ({time.monotonic() - began:.0f} s in all)")
    if left or not all(equal):
        sys.exit(1)


def say(sentence: str) -> None:
    """One step of the demo."""
    print(f"\n== {sentence}", flush=True)


def large_checkpoint(folder: Path) -> Path:
    """A random Qwen3-MoE with about 1.3 GB of experts: 4 layers of 128, 2.5 MB each."""
    from tools.factory import write_checkpoint

    say("writing a random checkpoint")
    return write_checkpoint(folder / "demo-large", "qwen3_moe", hidden=2048, layers=4, n_experts=128, top_k=8,
                            expert_width=768, vocab=4096)  # fmt: skip


def expert_bytes(model: Path) -> int:
    """Bytes of all experts of a checkpoint (asked of the worker's manifest, in a process of its own)."""
    code = (
        "import sys, pathlib; from expertd.worker.manifest import load_lazily;"
        "m = load_lazily(pathlib.Path(sys.argv[1])).manifest;"
        "print(sum(layer.experts * layer.block_bytes for layer in m.layers))"
    )
    return int(subprocess.run([sys.executable, "-c", code, str(model)], check=True, capture_output=True).stdout)


def budget_of(model: Path, share: float) -> int:
    """A budget that has room for the base weights of a checkpoint, and for such a share of its experts."""
    return int(expert_bytes(model) * share) + read_shape(model).base_segment


class Gateway:
    """``expertd serve`` as a user runs it, on any free port; ended with SIGTERM."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "expertd.clients.cli", "serve", str(model), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.url = ""

    def __enter__(self) -> Gateway:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"   {line.rstrip()}", flush=True)
            if " at http://" in line:
                self.url = line.split(" at ")[1].strip()
                return self
        raise SystemExit(f"the gateway ended with status {self._process.wait()}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        status = self._process.wait(30)
        if status != 0:
            raise SystemExit(f"the gateway ended with status {status}")


def chat_at_once(url: str, model: str, tokens: int) -> list[str]:
    """The answers to both questions, asked at the same moment by two processes, shown as they come."""
    clients = []
    for label, question in zip("AB", QUESTIONS, strict=True):
        print(f"{label} > {question}")
        command = [sys.executable, "-m", "tools.chat_client", url, model, label, str(tokens), question]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    results: queue.Queue[tuple[int, str]] = queue.Queue()

    def collect(number: int) -> None:
        results.put((number, clients[number].communicate(timeout=180)[0]))

    threads = [threading.Thread(target=collect, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(client.returncode for client in clients):
        raise SystemExit("a client failed")
    answers = dict(results.get() for _ in clients)
    return [str(json.loads(answers[number].splitlines()[-1])) for number in range(len(clients))]


def plain_answers(model: Path, tokens: int) -> list[str]:
    """What plain mlx-lm says, greedily, with the whole model in memory."""
    from mlx_lm import generate, load

    plain, tokenizer = load(str(model))[:2]
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        answers.append(generate(plain, tokenizer, prompt, max_tokens=tokens))
    return answers


def left_behind(home: Path, pids: list[int]) -> list[str]:
    """Processes, segments and files that should be gone and are not."""
    left = [f"process {pid}" for pid in pids if psutil.pid_exists(pid)]
    left += [f"process {child.pid}" for child in psutil.Process().children(recursive=True)]
    left += [str(path) for path in Path("/dev/shm").glob("expertd*")]
    return left + ([str(home)] if home.exists() else [])


if __name__ == "__main__":
    main()
