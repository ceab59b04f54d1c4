"""One app of ``make demo-warmth``: loads a model, then generates what it is asked for, and tells what that cost.

Lines of JSON: ``{"prompt", "tokens"}`` in; out ``{"ready_s"}`` once, then ``{"seconds", "misses", "bytes"}`` for each
token (what the whole daemon has missed and read since the last one), and ``{"text"}`` at the end of an answer.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    model_path = sys.argv[1]
    # Imports take the same time for whatever is warm or cold.
    from mlx_lm import stream_generate

    import expertd
    from expertd.clients import Client

    began = time.monotonic()
    model, tokenizer = expertd.load(model_path)[:2]
    tell(ready_s=time.monotonic() - began)
    for line in sys.stdin:
        asked = json.loads(line)
        messages = [{"role": "user", "content": asked["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        client = connected(Client)
        missed, read = figures(client)
        text = ""
        then = time.monotonic()
        for answer in stream_generate(model, tokenizer, prompt, max_tokens=asked["tokens"]):
            text += answer.text
            now = time.monotonic()
            try:
                misses, total = figures(client)
            except expertd.ExpertdError:  # its daemon has died, and there will be another one
                client = connected(Client)
                misses, total = figures(client)
            if misses < missed:  # the new one has counted from nothing
                missed = read = 0
            tell(seconds=now - then, misses=misses - missed, bytes=total - read)
            missed, read, then = misses, total, time.monotonic()
        client.close()
        tell(text=text)


def connected(client: Any) -> Any:
    """A client of the daemon, as soon as there is one."""
    import expertd

    while True:
        try:
            return client()
        except expertd.ExpertdError:
            time.sleep(0.02)


def figures(client: Any) -> tuple[int, int]:
    """Misses, and bytes that were read, of all models so far."""
    models = client.status().models
    return sum(model.misses for model in models), sum(model.bytes_read for model in models)


def tell(**facts: Any) -> None:
    """One line for whoever shows it."""
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
