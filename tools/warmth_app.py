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

    began = time.monotonic()
    model, tokenizer = expertd.load(model_path)[:2]
    tell(ready_s=time.monotonic() - began)
    for line in sys.stdin:
        asked = json.loads(line)
        messages = [{"role": "user", "content": asked["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        client = connected()
        missed, read = figures(client)
        text = ""
        then = time.monotonic()
        for answer in stream_generate(model, tokenizer, prompt, max_tokens=asked["tokens"]):
            text += answer.text
            now = time.monotonic()
            try:
                misses, total = figures(client)
            except expertd.ExpertdError:  # its daemon has died, and there will be another one
                client = connected()
                misses, total = figures(client)
            if misses < missed:  # the new one has counted from nothing
                missed = read = 0
            tell(seconds=now - then, misses=misses - missed, bytes=total - read)
            missed, read, then = misses, total, time.monotonic()
        client.close()
        tell(text=text)


def connected() -> Any:
    """A client of the daemon, which is started if there is none: a session does that only when it misses something."""
    from expertd.clients import Client
    from expertd.protocol.paths import Home
    from expertd.protocol.rendezvous import connect_or_start

    connect_or_start(Home.current(), "client")[0].close()
    return Client()


def figures(client: Any) -> tuple[int, int]:
    """Misses, and bytes that were read, of all models so far."""
    models = client.status().models
    return sum(model.misses for model in models), sum(model.bytes_read for model in models)


def tell(**facts: Any) -> None:
    """One line for whoever shows it."""
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
