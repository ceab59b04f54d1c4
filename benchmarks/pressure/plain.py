"""``python -m benchmarks.pressure.plain MODEL TOKENS QUESTIONS``: what plain mlx-lm answers, as a JSON list."""

from __future__ import annotations

import json
import sys

import mlx_lm


def main() -> None:
    """See the module."""
    model, tokenizer = mlx_lm.load(sys.argv[1])[:2]
    texts = []
    for question in json.loads(sys.argv[3]):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        texts.append(mlx_lm.generate(model, tokenizer, prompt, max_tokens=int(sys.argv[2])))
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
