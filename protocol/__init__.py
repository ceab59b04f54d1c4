"""What processes agree on: messages, errors, shared-memory layout, checkpoints' fingerprints, paths.

Also what several of them need alike: sizes as people write them, how much memory a container leaves.

``PROTOCOL.md`` beside this file is the specification; ``tests/test_protocol_document.py`` holds it to the code.  This
package imports neither mlx nor anything else of expertd.
"""

from __future__ import annotations

PROTOCOL = 4
"""Version of the wire protocol.  Changes only when an older peer would misunderstand a newer one."""

VERSION = "0.1.0"
"""Version of the package.  The build takes it from here: to ask the installed metadata costs more than all of
``expertd status``."""

__all__ = ["PROTOCOL", "VERSION"]
