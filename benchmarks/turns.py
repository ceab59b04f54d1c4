"""A conversation of twenty turns through the gateway: does it get slower, does it grow, does the cache get better?

Every turn sends the whole conversation, as chat programs do.  Beside the drift over the turns it tells whether the
prompt cache has what earlier turns computed, and what one more turn costs in memory (its KV cache, and nothing else).
"""

from __future__ import annotations

import json
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import psutil

from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon
from tools.demo import DEMO_MODEL, Gateway, budget_of
from tools.stage import ask_status, temporary_home

SHARE = 0.5
"""Of the experts fits the budget."""
TURNS = 20
TOKENS = 48
TASKS = (
    "What does os.path.join do?",
    "Write the function clamp: Limit x to the range from low to high.",
    "What is the module socket for?",
    "Write the function mean: Return the mean of a list of numbers.",
)


@dataclass(frozen=True)
class Turn:
    """What one turn took: ``tokens_s`` leaves the first token out, which is the prompt's."""

    hits: int
    misses: int
    tokens_s: float
    first_s: float
    prompt_tokens: int
    cached_tokens: int
    worker_bytes: int
    daemon_bytes: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def run(quick: bool = False) -> dict[str, Any]:
    """Hit rates, tokens a second and resident bytes, of the first turns and of the last; ``lost_prefix_tokens`` is 0
    if no turn has computed again what an earlier one had."""
    turns = TURNS // 2 if quick else TURNS
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        home.config.write_text(f"budget = {budget_of(DEMO_MODEL, SHARE)}\n")
        stack.callback(stop_daemon, home, "benchmark")
        gateway = stack.enter_context(Gateway(DEMO_MODEL))
        messages: list[dict[str, str]] = []
        found = []
        print(f"\n{'turn':>4}  {'prompt':>6}  {'cached':>6}  {'hits':>6}  {'tokens/s':>8}  {'worker':>8}  daemon")
        for number in range(turns):
            messages.append({"role": "user", "content": TASKS[number % len(TASKS)]})
            turn, text = _ask(home, gateway, messages)
            messages.append({"role": "assistant", "content": text})
            found.append(turn)
            print(f"{number + 1:4}  {turn.prompt_tokens:6}  {turn.cached_tokens:6}  {100 * turn.hit_rate:5.1f}%"
                  f"  {turn.tokens_s:8.1f}  {turn.worker_bytes / 1e6:5.0f} MB  {turn.daemon_bytes / 1e6:5.1f} MB",
                  flush=True)  # fmt: skip
    quarter = turns // 4
    first, last = found[1 : 1 + quarter], found[-quarter:]  # the first one of all is cold
    lost = [max(0, before.prompt_tokens - now.cached_tokens) for before, now in pairwise(found)]
    return {
        "turns": turns,
        "hit_rate_first": round(median(turn.hit_rate for turn in first), 3),
        "hit_rate_last": round(median(turn.hit_rate for turn in last), 3),
        "speed_last_to_first": round(
            median(turn.tokens_s for turn in last) / median(turn.tokens_s for turn in first), 3
        ),
        "lost_prefix_tokens": max(lost),
        "worker_growth_bytes_a_token": round(_growth(found[quarter:])),
        "kv_bytes_a_token": _kv_bytes(),
        "daemon_growth_mb": round((found[-1].daemon_bytes - found[quarter].daemon_bytes) / 1e6, 2),
    }  # fmt: skip


def _ask(home: Home, gateway: Gateway, messages: list[dict[str, str]]) -> tuple[Turn, str]:
    before = _counts(home)
    body = {"model": DEMO_MODEL.name, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    request = urllib.request.Request(f"{gateway.url}/chat/completions", json.dumps(body).encode())
    text, times, usage = "", [time.monotonic()], {}
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    text += event["choices"][0]["delta"]["content"]
                    times.append(time.monotonic())
    hits, misses = (after - was for after, was in zip(_counts(home), before, strict=True))
    worker = next(child for child in psutil.Process(gateway.pid).children() if "worker" in child.cmdline())
    turn = Turn(
        hits=hits,
        misses=misses,
        tokens_s=(len(times) - 2) / max(1e-9, times[-1] - times[1]),
        first_s=times[1] - times[0],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        worker_bytes=_anonymous(worker.pid),
        daemon_bytes=_anonymous(ask_status(home).daemon.pid),
    )
    return turn, text


def _growth(turns: list[Turn]) -> float:
    """Bytes of the worker that each token of the conversation has added."""
    first, last = turns[0], turns[-1]
    return (last.worker_bytes - first.worker_bytes) / (last.prompt_tokens - first.prompt_tokens)


def _kv_bytes() -> int:
    """What a token takes in one KV cache; a worker has the one that it works on and the one that it keeps."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    return int(2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def _counts(home: Home) -> tuple[int, int]:
    models = ask_status(home).models
    return sum(model.hits for model in models), sum(model.misses for model in models)


def _anonymous(pid: int) -> int:
    """Bytes that are the process's own."""
    full = psutil.Process(pid).memory_full_info()
    return int(full.uss)
