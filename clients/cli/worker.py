"""``expertd worker MODEL --gateway ADDR``: one worker process.  ``expertd serve`` starts it; people rarely do."""

from __future__ import annotations

import sys

import click

from expertd.clients.cli.parameters import worker_budget_option


@click.command()
@click.argument("model")
@click.option("--gateway", metavar="ADDR", required=True, help="ZeroMQ address of the gateway, as ipc:///path.")
@worker_budget_option
@click.option("--parent", type=int, hidden=True, help="Process whose end ends this one.")
def worker(model: str, gateway: str, budget: str | None, parent: int | None) -> None:
    """Run one worker for a gateway (started by 'expertd serve'); MODEL is a checkpoint's folder or name."""
    from expertd.worker.process import run

    sys.exit(run(model, gateway, budget=budget, parent=parent))
