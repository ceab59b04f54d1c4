"""``expertd verify``: is this machine's worker exact?"""

from __future__ import annotations

import sys

import click

from expertd.clients.cli.parameters import budget_option, complete_model
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
@budget_option
def verify(model: str, tokens: int, by_layer: bool, budget: str | None) -> None:
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
    click.echo(
        f"worker: mode {session.mode}, {sum(p.layout.slots for p in session.pools)} slots for "
        f"{sum(p.layout.layers * p.layout.experts for p in session.pools)} blocks, device {mx.default_device()}"
    )
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, tokenizer.vocab_size, (1, length)) for length in PROMPT_LENGTHS]
    free = available_bytes()
    if by_layer or size * 1.2 > free:
        click.echo(f"comparing layer by layer ({show_size(size)} of weights, {show_size(free)} of memory free)")
        differences = compare_layers(folder, cached, prompts)
        click.echo("\n".join(differences) or "no difference: every layer's outputs are bit-equal")
        failed = bool(differences)
    else:
        plain, _ = load_model(folder)
        failed = False
        for prompt in prompts:
            one, other = greedy(plain, prompt, tokens), greedy(cached, prompt, tokens)
            difference = first_difference(one, other)
            failed = failed or tokens_difference(one, other) is not None
            said = difference or f"no difference: logits bit-equal and {tokens} greedy tokens equal"
            click.echo(f"prompt of {prompt.shape[1]} tokens: {said}")
    expertd.unload(cached)
    sys.exit(1 if failed else 0)
