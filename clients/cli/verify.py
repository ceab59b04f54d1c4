"""``expertd verify``: is this machine's worker exact?"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from expertd.clients.cli.parameters import budget_option, complete_model, json_option, model_folder_option
from expertd.protocol.checkpoint import weight_files
from expertd.protocol.model_names import find_model
from expertd.protocol.sizes import show_size

PROMPT_LENGTHS = (1, 7, 300)


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Greedy tokens to compare.",
)
@click.option("--by-layer", is_flag=True, help="Compare layer by layer even if two models fit in memory.")
@model_folder_option
@budget_option
@json_option()
def verify(model: str, tokens: int, by_layer: bool, budget: str | None, as_json: bool) -> None:
    """Compare the logits and greedy tokens of a worker with those of plain mlx-lm.

    MODEL is a checkpoint's folder, or the name of one ('expertd models' lists what is here).

    Prints the first difference or that there is none.  Exits with 1 if a token differs, or if a layer does in a
    comparison by layer.  Where the whole model does not fit in memory beside the worker, it compares layer by layer.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    import expertd
    from expertd.worker.kv_memory import available_bytes
    from expertd.worker.load import session_of
    from expertd.worker.verify import compare_layers, first_difference, greedy, tokens_difference

    folder = find_model(model)
    size = sum(path.stat().st_size for path in weight_files(folder))
    cached, tokenizer = expertd.load(folder, budget=budget)
    session = session_of(cached)
    slots = sum(p.layout.slots for p in session.pools)
    blocks = sum(p.layout.layers * p.layout.experts for p in session.pools)
    device = str(mx.default_device())
    found: dict[str, Any] = {"model": str(folder), "mode": session.mode, "slots": slots, "blocks": blocks}
    found["device"] = device

    def say(line: str) -> None:
        if not as_json:
            click.echo(line)

    say(f"worker: mode {session.mode}, {slots} slots for {blocks} blocks, device {device}")
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, tokenizer.vocab_size, (1, length)) for length in PROMPT_LENGTHS]
    free = available_bytes()
    if by_layer or size * 1.2 > free:
        say(f"comparing layer by layer ({show_size(size)} of weights, {show_size(free)} of memory free)")
        differences = compare_layers(folder, cached, prompts)
        say("\n".join(differences) or "no difference: every layer's outputs are bit-equal")
        failed = bool(differences)
        found |= {"by_layer": True, "differences": differences}
    else:
        plain, _ = load_model(folder)
        failed = False
        found |= {"by_layer": False, "prompts": []}
        for prompt in prompts:
            one, other = greedy(plain, prompt, tokens), greedy(cached, prompt, tokens)
            difference = first_difference(one, other)
            same = tokens_difference(one, other) is None
            failed = failed or not same
            length = prompt.shape[1]
            found["prompts"].append(
                {"prompt_tokens": length, "tokens": tokens, "same_tokens": same, "difference": difference}
            )
            said = difference or f"no difference: logits bit-equal and {tokens} greedy tokens equal"
            say(f"prompt of {length} tokens: {said}")
    expertd.unload(cached)
    if as_json:
        click.echo(json.dumps(found | {"exact": not failed}, indent=2))
    sys.exit(1 if failed else 0)
