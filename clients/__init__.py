"""What talks to daemon and workers on a user's behalf: the Python client, the command line and the HTTP gateway.

Imports no mlx.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see terminal.fit
if TYPE_CHECKING:
    from typing import Any

    from expertd.clients.client import Client as Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    # Late, because whoever imports a module below this package need not wait for what the client needs.
    if name == "Client":
        from expertd.clients.client import Client

        return Client
    raise AttributeError(f"module 'expertd.clients' has no attribute '{name}'")
