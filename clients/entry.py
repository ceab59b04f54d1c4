"""What ``expertd`` in the shell runs: ``expertd status`` by a short way, all else by ``expertd.clients.cli``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process, and end it with the command's exit status."""
    if sys.argv[1:2] == ["status"]:
        from expertd.clients.quick_status import show_status

        try:
            if show_status(sys.argv[2:]):
                return
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            sys.exit(130)
    from expertd.clients.cli import main as program

    program()
