"""Try real clients against a real ``expertd serve``, and print what each does: the ground of docs/integrations.md.

    python -m tools.try_clients FOLDER [NAME...]

Each client is installed into an environment of its own in FOLDER (from the package registries, so it needs a network),
and asked for a few words, streamed and not.  A client that fails is shown with its last lines; the exit status is the
number of those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.stage import temporary_home

ROOT = Path(__file__).parents[1]
QUESTION = "What is the module socket for?"
LONGEST_S = 180

OPENAI_PY = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
ask = dict(model="demo", messages=[{"role": "user", "content": sys.argv[2]}], max_tokens=16, temperature=0)
print(client.chat.completions.create(**ask).choices[0].message.content)
print("".join(part.choices[0].delta.content or "" for part in client.chat.completions.create(stream=True, **ask)))
"""
LITELLM = """
import sys, litellm
ask = dict(model="openai/demo", api_base=sys.argv[1], api_key="none", max_tokens=16, temperature=0,
           messages=[{"role": "user", "content": sys.argv[2]}])
print(litellm.completion(**ask).choices[0].message.content)
print("".join(part.choices[0].delta.content or "" for part in litellm.completion(stream=True, **ask)))
"""
LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="demo", max_tokens=16, temperature=0)
print(chat.invoke(sys.argv[2]).content)
print("".join(part.content for part in chat.stream(sys.argv[2])))
"""
LLM = """
- model_id: expertd
  model_name: demo
  api_base: URL
  api_key_name: expertd
"""
OPENAI_JS = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none" });
const ask = { model: "demo", max_tokens: 16, temperature: 0, messages: [{ role: "user", content: process.argv[3] }] };
console.log((await client.chat.completions.create(ask)).choices[0].message.content);
let said = "";
for await (const part of await client.chat.completions.create({ ...ask, stream: true }))
  said += part.choices[0]?.delta?.content ?? "";
console.log(said);
"""
AI_SDK = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const model = createOpenAICompatible({ name: "expertd", baseURL: process.argv[2] })("demo");
const ask = { model, prompt: process.argv[3], maxOutputTokens: 16, temperature: 0 };
console.log((await generateText(ask)).text);
let said = "";
for await (const part of streamText(ask).textStream) said += part;
console.log(said);
"""


class Client(NamedTuple):
    """What to install, and the commands that try it, made from its folder and the API's URL."""

    packages: tuple[str, ...]
    commands: Callable[[Path, str], list[list[str]]]


def _python(program: str) -> Callable[[Path, str], list[list[str]]]:
    return lambda folder, url: [[f"{folder}/bin/python", "-c", program, url, QUESTION]]


def _node(program: str) -> Callable[[Path, str], list[list[str]]]:
    def commands(folder: Path, url: str) -> list[list[str]]:
        (folder / "try.mjs").write_text(program)
        return [["node", f"{folder}/try.mjs", url, QUESTION]]

    return commands


def _llm(folder: Path, url: str) -> list[list[str]]:
    (folder / "extra-openai-models.yaml").write_text(LLM.replace("URL", url))
    llm = f"{folder}/bin/llm"
    ask = [llm, "-m", "expertd", "-o", "max_tokens", "16", "-o", "temperature", "0", QUESTION]
    return [[llm, "keys", "set", "expertd", "--value", "none"], [*ask, "--no-stream"], ask]


def _aider(folder: Path, url: str) -> list[list[str]]:
    (folder / ".aider.model.settings.yml").write_text("- name: openai/demo\n  extra_params: {max_tokens: 128}\n")
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--map-tokens", "0"]
    quiet += ["--chat-history-file", f"{folder}/chat", "--input-history-file", f"{folder}/input"]
    return [[f"{folder}/bin/aider", "--model", "openai/demo", "--chat-mode", "ask", *quiet, "--message", QUESTION]]


def _curl(folder: Path, url: str) -> list[list[str]]:
    body = f'{{"model": "demo", "max_tokens": 16, "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    return [["curl", "-sS", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]]


CLIENTS = {
    "curl": Client((), _curl),
    "openai": Client(("openai",), _python(OPENAI_PY)),
    "litellm": Client(("litellm",), _python(LITELLM)),
    "langchain": Client(("langchain-openai",), _python(LANGCHAIN)),
    "llm": Client(("llm",), _llm),
    "aider": Client(("aider-chat",), _aider),
    "openai-js": Client(("npm:openai",), _node(OPENAI_JS)),
    "ai-sdk": Client(("npm:ai", "npm:@ai-sdk/openai-compatible"), _node(AI_SDK)),
}


def install(client: Client, folder: Path) -> None:
    """Install a client's packages into ``folder``, unless something is there already."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    if any(package.startswith("npm:") for package in client.packages):
        names = [package.removeprefix("npm:") for package in client.packages]
        subprocess.run(["npm", "install", "--silent", "--no-audit", *names], cwd=folder, check=True)
    elif client.packages:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *client.packages], check=True)


def attempt(name: str, folder: Path, url: str) -> bool:
    """Try one client, print what it said, and whether it worked."""
    client = CLIENTS[name]
    install(client, folder)
    environment = {
        **os.environ, "HOME": str(folder), "LLM_USER_PATH": str(folder), "OPENAI_API_BASE": url,
        "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }  # fmt: skip
    for command in client.commands(folder, url):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip().splitlines()[-4:]
        print(*(f"{name}: {line}" for line in lines), sep="\n", flush=True)
        if done.returncode:
            print(f"{name}: FAILED with {done.returncode}", flush=True)
            return False
    return True


def main() -> None:
    folder, names = Path(sys.argv[1]).absolute(), sys.argv[2:] or list(CLIENTS)
    command = [sys.executable, "-m", "expertd.clients.cli", "serve", str(ROOT / "models/demo"), "--port", "0"]
    with temporary_home(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        try:
            assert gateway.stdout is not None
            url = gateway.stdout.readline().split()[-1]
            failed = [name for name in names if not attempt(name, folder / name, url)]
        finally:
            gateway.terminate()
            gateway.wait()
            subprocess.run([*command[:3], "daemon", "stop"], stdout=subprocess.DEVNULL)
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
