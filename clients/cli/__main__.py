"""``python -m expertd.clients.cli``: the ``expertd`` command of this interpreter."""

from __future__ import annotations

from expertd.clients.cli import main

if __name__ == "__main__":
    main(prog_name="expertd")
