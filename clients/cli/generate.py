"""``expertd generate``: text from a prompt, through a worker in this process."""

from __future__ import annotations

import sys
from typing import Any

import click

from expertd.clients.cli.parameters import (
    budget_option,
    complete_model,
    config_option,
    find_or_pull,
    model_folder_option,
)
from expertd.clients.cli.wrap import take_any_bytes
from expertd.protocol.config import read_config
from expertd.protocol.paths import Home


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("prompt")
@model_folder_option
@config_option("generate_max_tokens")
@config_option("generate_temperature")
@config_option("generate_kv_bits")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the model's chat template.")
@budget_option
def generate(model: str, prompt: str, raw: bool, budget: str | None, **flags: Any) -> None:
    """Generate text from PROMPT ('-' reads it from standard input) with MODEL.

    MODEL is a checkpoint's folder, or the name of one, as an id of the hub ('expertd models' lists what is here).
    """
    take_any_bytes()
    config = read_config(Home.current(), **flags)
    max_tokens, temperature = config.generate_max_tokens.value, config.generate_temperature.value
    kv_bits = config.generate_kv_bits.value
    folder = find_or_pull(model)  # before mlx is imported, which takes a second
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    import expertd
    from expertd.worker.answers import encode_prompt
    from expertd.worker.kv_memory import check_kv_bits
    from expertd.worker.kv_quantized import new_caches

    loaded, tokenizer = expertd.load(folder, budget=budget)
    check_kv_bits(loaded, kv_bits)
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = encode_prompt(tokenizer, text, raw=raw)
    sampler = make_sampler(temp=temperature)
    caches = new_caches(loaded, kv_bits)
    for response in stream_generate(
        loaded, tokenizer, tokens, max_tokens=max_tokens, sampler=sampler, prompt_cache=caches
    ):
        click.echo(response.text, nl=False)
    click.echo()
    expertd.unload(loaded)
