"""``expertd generate``: text from a prompt, through a worker in this process."""

from __future__ import annotations

import sys

import click

from expertd.clients.cli.parameters import budget_option, find_or_pull


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the model's chat template.")
@budget_option
def generate(model: str, prompt: str, max_tokens: int, temperature: float, raw: bool, budget: str | None) -> None:
    """Generate text from PROMPT ('-' reads it from standard input) with MODEL.

    MODEL is a checkpoint's folder, or the name of one, as an id of the hub ('expertd models' lists what is here).
    """
    folder = find_or_pull(model)  # before mlx is imported, which takes a second
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    import expertd
    from expertd.worker.answers import encode_prompt

    loaded, tokenizer = expertd.load(folder, budget=budget)
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = encode_prompt(tokenizer, text, raw=raw)
    sampler = make_sampler(temp=temperature)
    for response in stream_generate(loaded, tokenizer, tokens, max_tokens=max_tokens, sampler=sampler):
        click.echo(response.text, nl=False)
    click.echo()
    expertd.unload(loaded)
