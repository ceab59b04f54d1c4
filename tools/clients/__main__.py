"""Try real clients against a real ``expertd serve``, and print a table of what each does: ``make clients``.

    python -m tools.clients [NAME...] [--json FILE]

Each client is installed from its registry into an environment of its own in ``.tmp/clients``, so the first run needs a
network; later ones do not.  It has a short exchange with the demo model (with a template that knows tools), streamed
and not, and calls a tool where it can: programs for libraries are in ``programs``, commands for the others below.  What
the model says makes no sense; what is judged is whether the client understands it.  The exit status is 1 if a step of a
client fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tools.stage import temporary_home
from tools.tool_model import write_tool_model

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".tmp" / "clients"
PROGRAMS = Path(__file__).parent / "programs"
QUESTION = "What is the module socket for?"
STEPS = ("plain", "streamed", "tools")
LONGEST_S = 420
"""For one command: an agent's prompt has ten thousands of tokens."""

LLM_MODELS = """
- model_id: expertd
  model_name: {model}
  api_base: {url}
  api_key_name: expertd
  supports_tools: true
"""
CODEX = """
model = "{model}"
model_provider = "expertd"
web_search = "disabled"
[features]
multi_agent = false
[model_providers.expertd]
name = "expertd"
base_url = "{url}"
wire_api = "responses"
"""


class Step(NamedTuple):
    """A command that shows one or more of ``STEPS``: those that it prints, or ``shows`` if it ends well with a text."""

    command: Sequence[str]
    shows: str | None = None


class Place(NamedTuple):
    """Where a client is installed, and what it talks to."""

    folder: Path
    url: str
    model: str

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def bin(self, name: str) -> str:
        """A command that npm or pip has installed."""
        found = self.folder / "node_modules" / ".bin" / name
        return str(found if found.exists() else self.folder / "bin" / name)


class Client(NamedTuple):
    """A client: what to install, how it is tried, and what of its environment differs from all others'."""

    package: str
    steps: Callable[[Place], list[Step]]
    needs: tuple[str, ...] = ()
    environment: Callable[[Place], Mapping[str, str]] = lambda place: {}


class Outcome(NamedTuple):
    """How a client was: the steps that passed, and the last lines of the one that did not."""

    client: str
    version: str
    passed: tuple[str, ...]
    failure: str
    seconds: float


# -- the clients -------------------------------------------------------------------------------------------------------


def _python(program: str) -> Callable[[Place], list[Step]]:
    return lambda place: [Step([place.python, str(PROGRAMS / program)])]


def _node(program: str) -> Callable[[Place], list[Step]]:
    def steps(place: Place) -> list[Step]:
        copy = place.folder / program  # Node looks for packages where the program lies
        copy.write_text((PROGRAMS / program).read_text(encoding="utf-8"), encoding="utf-8")
        return [Step(["node", str(copy)])]

    return steps


def _curl(place: Place) -> list[Step]:
    ask = {"model": place.model, "max_tokens": 16, "messages": [{"role": "user", "content": QUESTION}]}
    url, kind = f"{place.url}/chat/completions", "Content-Type: application/json"
    command = ["curl", "-sS", "--fail-with-body", "-N", url, "-H", kind, "-d"]
    return [
        Step([*command, json.dumps(ask)], "plain"),
        Step([*command, json.dumps(ask | {"stream": True})], "streamed"),
    ]


def _llm(place: Place) -> list[Step]:
    (place.folder / "extra-openai-models.yaml").write_text(LLM_MODELS.format(url=place.url, model=place.model))
    ask = [place.bin("llm"), "-m", "expertd", "-o", "max_tokens", "16"]
    return [
        Step([place.bin("llm"), "keys", "set", "expertd", "--value", "none"]),
        Step([*ask, QUESTION, "--no-stream"], "plain"),
        Step([*ask, QUESTION], "streamed"),
        Step([*ask, "--tool", "llm_version", QUESTION], "tools"),
    ]


def _aider(place: Place) -> list[Step]:
    (place.folder / ".aider.model.settings.yml").write_text(
        f"- name: openai/{place.model}\n  extra_params: {{max_tokens: 128}}\n"
    )
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--map-tokens", "0"]
    quiet += ["--chat-history-file", f"{place.folder}/chat", "--input-history-file", f"{place.folder}/input"]
    model = ["--model", f"openai/{place.model}", "--chat-mode", "ask"]
    aider = [place.bin("aider"), *model, *quiet, "--message", QUESTION]
    return [Step([*aider, "--no-stream"], "plain"), Step(aider, "streamed")]


def _opencode(place: Place) -> list[Step]:
    return [Step([place.bin("opencode"), "run", "--model", f"expertd/{place.model}", QUESTION], "streamed")]


def _opencode_settings(place: Place) -> Mapping[str, str]:
    settings = {
        "autoupdate": False, "share": "disabled",
        "provider": {"expertd": {
            "npm": "@ai-sdk/openai-compatible", "options": {"baseURL": place.url, "apiKey": "none"},
            "models": {place.model: {"limit": {"context": 65536, "output": 64}}},
        }},
    }  # fmt: skip
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(settings), "OPENCODE_DISABLE_MODELS_FETCH": "1"}


def _codex(place: Place) -> list[Step]:
    (place.folder / "config.toml").write_text(CODEX.format(url=place.url, model=place.model))
    return [Step([place.bin("codex"), "exec", "--skip-git-repo-check", QUESTION], "streamed")]


def _claude(place: Place) -> list[Step]:
    # Its own system prompt has some ten thousand tokens, which a CPU needs minutes for.
    brief = ["--system-prompt", "Answer in one sentence."]
    return [Step([place.bin("claude"), "-p", QUESTION, "--model", place.model, *brief], "streamed")]


def _claude_settings(place: Place) -> Mapping[str, str]:
    return {
        "ANTHROPIC_BASE_URL": place.url.removesuffix("/v1"), "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096", "ANTHROPIC_DEFAULT_HAIKU_MODEL": place.model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }  # fmt: skip


CLIENTS = {
    "curl": Client("", _curl),
    "openai": Client("openai", _python("openai_python.py")),
    "anthropic": Client("anthropic", _python("anthropic_python.py")),
    "litellm": Client("litellm", _python("litellm_python.py")),
    "langchain": Client("langchain-openai", _python("langchain_python.py")),
    "llm": Client("llm", _llm),
    "aider": Client("aider-chat", _aider),
    "openai-node": Client("npm:openai", _node("openai_node.mjs")),
    "ai-sdk": Client("npm:@ai-sdk/openai-compatible", _node("ai_sdk_node.mjs"), ("npm:ai",)),
    "ai-sdk-openai": Client("npm:@ai-sdk/openai", _node("ai_sdk_openai_node.mjs"), ("npm:ai",)),
    "opencode": Client("npm:opencode-ai", _opencode, (), _opencode_settings),
    "codex": Client("npm:@openai/codex", _codex, (), lambda place: {"CODEX_HOME": str(place.folder)}),
    "claude-code": Client("npm:@anthropic-ai/claude-code", _claude, (), _claude_settings),
}


# -- what touches the machine ------------------------------------------------------------------------------------------


def install(client: Client, folder: Path) -> str:
    """Install a client's packages into ``folder``, unless they are there; return its version."""
    ready = folder / "ready"
    packages = [name for name in (client.package, *client.needs) if name]
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(name.startswith("npm:") for name in packages):
            names = [name.removeprefix("npm:") for name in packages]
            _call(["npm", "install", "--silent", "--no-audit", "--no-fund", *names], folder)
        elif packages:
            _call([sys.executable, "-m", "venv", str(folder)], folder)
            pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _call([*pip, *packages], folder)
        ready.touch()
    if client.package.startswith("npm:"):
        about = folder / "node_modules" / client.package.removeprefix("npm:") / "package.json"
        return str(json.loads(about.read_text(encoding="utf-8"))["version"])
    if not client.package:
        return "any"
    ask = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    return subprocess.run(
        [f"{folder}/bin/python", "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()


def _call(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def attempt(name: str, client: Client, folder: Path, url: str, model: str) -> Outcome:
    """Try one client."""
    folder.mkdir(parents=True, exist_ok=True)
    version = install(client, folder)
    place = Place(folder, url, model)
    environment = {
        **os.environ, "HOME": str(folder), "LLM_USER_PATH": str(folder), "OPENAI_API_BASE": url, "NO_COLOR": "1",
        "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "EXPERTD_URL": url, "EXPERTD_MODEL": model,
        "EXPERTD_QUESTION": QUESTION, **client.environment(place),
    }  # fmt: skip
    began = time.monotonic()
    passed: list[str] = []
    failure = ""
    for step in client.steps(place):
        status, said = _run(step.command, folder, environment)
        passed += [line for line in said.splitlines() if line in STEPS]
        if status or (step.shows and not said.strip()):
            failure = f"exit status {status}: " + " | ".join(said.strip().splitlines()[-6:])
            break
        passed += [step.shows] if step.shows else []
    return Outcome(name, version, tuple(passed), failure, round(time.monotonic() - began, 1))


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """The exit status of a command, and what it said: on standard output, and after a failure on the other, too."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return 124, f"{said}\nit took longer than {LONGEST_S} s"
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """A gateway in a home of its own: its URL and its model's name."""
    command = [sys.executable, "-m", "expertd.clients.cli"]
    with tempfile.TemporaryDirectory(prefix="expertd-") as root, temporary_home():
        model = write_tool_model(Path(root))
        serve = [*command, "serve", str(model), "--port", "0"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as gateway:
            try:
                assert gateway.stdout is not None
                yield gateway.stdout.readline().split()[-1], model.name
            finally:
                gateway.terminate()
                gateway.wait()
                subprocess.run([*command, "daemon", "stop"], stdout=subprocess.DEVNULL, check=False)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each client, and one below for what failed."""
    lines = [f"{'client':14} {'version':10} " + " ".join(f"{step:8}" for step in STEPS) + " seconds"]
    for one in outcomes:
        marks = " ".join(f"{'yes' if step in one.passed else '-':8}" for step in STEPS)
        lines.append(f"{one.client:14} {one.version:10} {marks} {one.seconds:7.1f}")
        if one.failure:
            lines.append(f"    FAILED with {one.failure}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.clients", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(CLIENTS)}; all, if none is given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in CLIENTS]
    if unknown:
        parser.error(f"there is no client {unknown[0]!r}; there are {', '.join(CLIENTS)}")
    outcomes = []
    with serving() as (url, model):
        for name in arguments.names or CLIENTS:
            outcomes.append(attempt(name, CLIENTS[name], CACHE / name, url, model))
            print(*table(outcomes[-1:])[0 if len(outcomes) == 1 else 1 :], sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([one._asdict() for one in outcomes], indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if any(one.failure for one in outcomes) else 0)


if __name__ == "__main__":
    main()
