"""One chat through the official ``openai`` SDK, streamed to the terminal line by line: a client as users have it.

    python -m tools.chat_client URL MODEL LABEL TOKENS QUESTION

The whole answer goes to standard output as JSON in the last line, for whoever wants to compare it.
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI


def main() -> None:
    """See the module."""
    url, model, label, tokens, question = sys.argv[1:]
    client = OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=int(tokens),
        temperature=0,
        stream=True,
    )
    answer, line = "", ""
    for chunk in stream:
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        answer += piece
        line += piece
        while "\n" in line or len(line) > 100:
            cut = line.find("\n") if "\n" in line else line.rfind(" ", 0, 100)
            cut = cut if cut > 0 or "\n" in line else 100
            print(f"{label} | {line[:cut]}", file=sys.stderr, flush=True)
            line = line[cut:].removeprefix("\n").removeprefix(" ") if cut < len(line) else ""
    print(f"{label} | {line}", file=sys.stderr, flush=True)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
