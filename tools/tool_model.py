"""The demo model with a chat template that knows tools, for tests and for clients that bring some.

It has not learned to call any, so it only calls one where that is enforced (``tool_choice``), with arguments that fit
the tool's schema and make no sense.  Its context is long on paper: agents' prompts are.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["DEMO", "write_tool_model"]

DEMO = Path(__file__).parents[1] / "models" / "demo"
CONTEXT = 65536

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: "
    "{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for tool_call in message.tool_calls or [] %}"
    "{% if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}"
    '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's and Hermes' models have it, with the tools' names alone, and as strict as Qwen's about system messages."""


def write_tool_model(folder: Path, name: str = "demo-tools") -> Path:
    """The model as a folder ``name`` in ``folder``; its weights are those of the demo model (links)."""
    made = folder / name
    made.mkdir(parents=True)
    for file in DEMO.iterdir():
        if file.suffix in (".safetensors", ".json"):
            (made / file.name).symlink_to(file)
    _change(made / "tokenizer_config.json", chat_template=TEMPLATE, model_max_length=CONTEXT)
    _change(made / "config.json", max_position_embeddings=CONTEXT)
    return made


def _change(file: Path, **fields: object) -> None:
    """Replace a link by a copy with other ``fields``."""
    said = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    file.write_text(json.dumps(said | fields, indent=2) + "\n", encoding="utf-8")
