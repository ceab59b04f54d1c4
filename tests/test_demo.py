"""The demo as ``make demo`` runs it, and the model that ships with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx_lm

from tools.demo import DEMO_MODEL, QUESTIONS


def test_the_demo_shows_the_same_text_as_plain_mlx_lm_and_leaves_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.demo"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same text") == len(QUESTIONS)
    # There are 76 slots for 192 blocks; one is kept free, and in others something may be on its way.
    assert re.search(r" 3[789]\.\d % of its experts are in memory, ", done.stdout)
    assert "  used by  expertd serve (process " in done.stdout
    assert "left behind: nothing" in done.stdout


def test_the_demo_model_is_small_and_ends_its_answers() -> None:
    size = sum(path.stat().st_size for path in DEMO_MODEL.rglob("*"))
    assert size <= 24_000_000
    model, tokenizer = mlx_lm.load(str(DEMO_MODEL))[:2]
    asked = [{"role": "user", "content": "What is the module socket for?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=60)
    assert answer.startswith("The socket module")
    assert len(tokenizer.encode(answer)) < 60


def test_the_figures_of_the_demo_model_are_good() -> None:
    figures = json.loads((Path(DEMO_MODEL) / "figures.json").read_text())
    assert figures["dead_experts_by_layer"] == [0] * 6
    perplexity = figures["held_out_perplexity"]
    for domain, shipped in perplexity["shipped"].items():
        assert shipped <= 1.03 * perplexity["float32"][domain], domain
        assert shipped < perplexity["first_version"][domain], domain
    for shares in figures["hottest_quarter_jaccard_by_layer"].values():
        assert len(shares) == 6


def test_the_demo_model_writes_code_and_prose() -> None:
    model, tokenizer = mlx_lm.load(str(DEMO_MODEL))[:2]
    asked = [{"role": "user", "content": "Write the function clamp: Limit a value to a range."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    code = mlx_lm.generate(model, tokenizer, prompt, max_tokens=40)
    prose = mlx_lm.generate(model, tokenizer, "My fellow citizens, the state of our", max_tokens=40)
    assert code.startswith("```python\n") and "self" in code
    assert "the people of the United States" in prose
