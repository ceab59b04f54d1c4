"""A program as users write it: ``expertd.load``, a few tokens through mlx-lm, then hold everything until told to end.

    python -m tools.hold MODEL TOKENS [shm|copy]

Prints one JSON line: tokens generated, and this process's anonymous memory before and after loading.  Ends when its
standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tools.memory import memory_of


def main() -> None:
    """See the module."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step

    import expertd

    mx.eval(mx.zeros((8,)) + 1)
    before = memory_of(os.getpid())
    model, _ = expertd.load(Path(sys.argv[1]), alias=sys.argv[3] if len(sys.argv) > 3 else "auto")
    steps = generate_step(mx.array(np.arange(3, 60)), model, max_tokens=int(sys.argv[2]))
    tokens = [int(token) for token, _ in steps]
    mx.clear_cache()
    after = memory_of(os.getpid())
    said = {"tokens": tokens, "anonymous_before": before.anonymous, "anonymous_after": after.anonymous}
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    expertd.unload(model)


if __name__ == "__main__":
    main()
