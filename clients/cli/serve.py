"""``expertd serve MODEL``: an OpenAI API over one model, until it is stopped.

Output: one line on stdout once requests are taken, ``expertd: serving NAME at URL``.  Exit status 0 after SIGTERM or
Ctrl-C; 2 where MODEL is no checkpoint; 5 where the port is taken; otherwise that of the error.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from expertd.clients.cli.parameters import budget_option, complete_model, config_option, log_options
from expertd.protocol.checkpoint import weight_files
from expertd.protocol.config import read_config
from expertd.protocol.errors import ExpertdError
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect_or_start, stop_if_idle


@click.command()
@click.argument("model", shell_complete=complete_model)
@config_option("serve_port")
@config_option("serve_host")
@budget_option
@log_options
def serve(model: str, budget: str | None, **flags: Any) -> None:
    """Serve the checkpoint in the folder MODEL over an OpenAI API, until Ctrl-C or SIGTERM.

    Prints one line on stdout when it takes requests.  What it does is in its log ('expertd logs'); warnings are on
    stderr, too.  Exits with 5 if the port is taken.
    """
    from expertd.clients.gateway import lifetime
    from expertd.protocol import logs

    path = Path(model).expanduser()
    weight_files(path)
    home = Home.current()
    config = read_config(home, **flags)
    host, port = config.serve_host.value, config.serve_port.value
    home.prepare()
    logs.set_up("gateway", home.gateway_log(os.getpid()), home, config)
    os.environ.update(logs.environment(config))  # its worker, and the daemon if there is none, log as it does
    # The port comes first: whoever cannot listen should not have started anything.
    with lifetime.listen(host, port) as listener:
        connection, started = connect_or_start(
            home, "gateway", budget=budget, announce=lambda line: click.echo(f"expertd: {line}", err=True)
        )
        connection.close()

        def announce(url: str) -> None:
            click.echo(f"expertd: serving {path.resolve().name} at {url}")
            sys.stdout.flush()

        try:
            asyncio.run(lifetime.serve(listener, host, path, home=home, budget=budget, ready=announce))
        except ExpertdError:
            if started:
                stop_if_idle(home, "gateway")
            raise
