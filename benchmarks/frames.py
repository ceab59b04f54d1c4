"""A flood of frames that no peer should send, against a daemon and a gateway that are at work.

Four of five go to the daemon.  All the while a worker of each kind (a program, and the gateway's) generates, and every
token is compared with plain mlx-lm's.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lm
import psutil

import expertd
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.memory import memory_of
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

FRAMES, FRAMES_QUICK = 1_000_000, 50_000
DAEMON_SHARE = 0.8
WARM_UP = 2_000
"""Frames that come before memory is first measured: what is allocated once is no growth."""
TOKENS = 16
HELLO = [{"role": "user", "content": "Hello there."}]
ARRIVAL_S = 60.0


@dataclass(frozen=True)
class Target:
    """One process that is flooded, and how to see how many frames it has dropped."""

    name: str
    pid: int
    socket: Path
    log: Path

    @property
    def anonymous(self) -> int:
        return memory_of(self.pid).anonymous


class Working(threading.Thread):
    """Calls ``once`` again and again; counts how often what it says was right."""

    def __init__(self, name: str, once: Any) -> None:
        super().__init__(name=name, daemon=True)
        self._once = once
        self._ending = threading.Event()
        self.right = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                right = self._once()
            except Exception as error:  # whatever it is, it is the finding
                self.wrong.append(f"{self.name}: {type(error).__name__}: {error}")
                continue
            self.right += right
            if not right:
                self.wrong.append(f"{self.name}: other tokens")

    def end(self) -> None:
        """Let it finish what it is at."""
        self._ending.set()
        self.join(120)
        if self.is_alive():
            self.wrong.append(f"{self.name}: stuck")


def run(quick: bool = False) -> dict[str, Any]:
    """``frames`` sent, ``crashes`` of whom they were sent to, growth of its memory, and answers right meanwhile."""
    return flood(FRAMES_QUICK if quick else FRAMES)


def flood(count: int) -> dict[str, Any]:
    """The figures of ``run`` for ``count`` frames."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertd-")))
        home = stack.enter_context(temporary_home())
        path = write_checkpoint(folder / "model", "qwen3_moe", hidden=128, expert_width=128, n_experts=16)
        plain, tokenizer = mlx_lm.load(str(path))[:2]
        prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)
        expected = _tokens(plain, tokenizer, prompt)
        text = mlx_lm.generate(plain, tokenizer, prompt, max_tokens=TOKENS)
        manifest = load_lazily(path).manifest
        slots = sum(layer.experts for layer in manifest.layers) * 2 // 5
        daemon = stack.enter_context(running_daemon(home, budget_for(manifest, slots)))
        gateway, port = _gateway(stack, home, path)
        targets = [
            Target("daemon", daemon.pid, home.daemon_socket, home.daemon_log),
            Target("gateway", gateway.pid, home.gateway_socket(gateway.pid), home.root / "gateway.log"),
        ]
        model, _ = expertd.load(path)
        stack.callback(expertd.unload, model)
        workers = [
            Working("program", lambda: _tokens(model, tokenizer, prompt) == expected),
            Working("gateway's worker", lambda: _chat(port) == text),
        ]
        for worker in workers:
            worker.start()
        figures = _flood(targets, count, home)
        for worker in workers:
            worker.end()
        figures["right_during"] = sum(worker.right for worker in workers)
        wrong = [line for worker in workers for line in worker.wrong]
        for line in wrong[:10]:
            print(line)
        figures["wrong_during"] = len(wrong)
        newcomer, _ = expertd.load(path)
        figures["right_after"] = _tokens(newcomer, tokenizer, prompt) == expected and _chat(port) == text
        expertd.unload(newcomer)
    return figures


def _flood(targets: list[Target], count: int, home: Home) -> dict[str, Any]:
    shares = [round(count * DAEMON_SHARE), count - round(count * DAEMON_SHARE)]
    for target in targets:
        _send(target, WARM_UP, seed=0)
    anonymous, crashes = [[target.anonymous for target in targets]], 0
    began = time.monotonic()
    dropped_before = ask_status(home).frames_dropped
    for half in (1, 2):
        for target, share in zip(targets, shares, strict=True):
            _send(target, share // 2, seed=half)
        alive = [psutil.pid_exists(target.pid) for target in targets]
        crashes += alive.count(False)
        if crashes:
            break
        anonymous.append([target.anonymous for target in targets])
    took_s = time.monotonic() - began
    arrived = ask_status(home).frames_dropped - dropped_before
    print(f"anonymous memory of {', '.join(t.name for t in targets)} before, at half time, at the end:")
    for line in anonymous:
        print("  " + ", ".join(f"{size / 1e6:.1f} MB" for size in line))
    return {
        "frames": sum(share // 2 * 2 for share in shares),
        "crashes": crashes,
        "dropped_by_daemon": arrived,
        "dropped_by_gateway": _dropped_by_gateway(targets[1]),
        "rss_growth_mb": _growth_mb(anonymous[0], anonymous[-1]),
        "rss_growth_second_half_mb": _growth_mb(anonymous[-2], anonymous[-1]),
        "log_mb": round(sum(target.log.stat().st_size for target in targets) / 1e6, 1),
        "frames_per_s": round(count / took_s),
    }


def _growth_mb(before: list[int], after: list[int]) -> float:
    """That of the one that grew most."""
    return round(max(b - a for a, b in zip(before, after, strict=True)) / 1e6, 2)


def _send(target: Target, count: int, seed: int) -> None:
    command = [sys.executable, "-m", "benchmarks._flood", str(target.socket), str(count), str(seed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _dropped_by_gateway(target: Target) -> int:
    """What it says in its log, at most once a second: one more bad frame makes it tell of all before."""
    time.sleep(1.5)
    _send(target, 1, seed=3)
    deadline, said = time.monotonic() + ARRIVAL_S, -1
    while time.monotonic() < deadline:
        found = re.findall(r"(\d+) frames dropped", target.log.read_text()[-20_000:])
        now = int(found[-1]) if found else 0
        if now == said:
            break
        said = now
        time.sleep(1.0)
    return said


def _gateway(stack: ExitStack, home: Home, model: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "expertd.clients.cli", "serve", str(model), "--port", "0"]
    with (home.root / "gateway.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    assert process.stdout is not None
    stack.enter_context(process)
    stack.callback(process.terminate)
    line = process.stdout.readline()
    return process, int(line.rstrip().split(":")[-1].removesuffix("/v1"))


def _tokens(model: Any, tokenizer: Any, prompt: list[int]) -> list[int]:
    return [answer.token for answer in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=TOKENS)]


def _chat(port: int) -> str:
    """The gateway's answer to HELLO.  Raises LookupError with the body if that is an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        body = {"model": "model", "messages": HELLO, "max_tokens": TOKENS, "temperature": 0}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        said = json.loads(connection.getresponse().read())
        if "choices" not in said:
            raise LookupError(str(said))
        return str(said["choices"][0]["message"]["content"])
    finally:
        connection.close()
