"""Makes mlx-lm checkpoints of any size in seconds: the model files of tests, demos and benchmarks.

``write_checkpoint`` writes one; ``cells`` lists every kind that plain mlx-lm can run on this machine and ``left_out``
the others with reasons. It needs mlx-lm, and it trains nothing: the values are random.
"""

from tools.factory.cells import Cell, cells, left_out
from tools.factory.checkpoint import write_checkpoint
from tools.factory.families import FAMILIES, Family, Sizes

__all__ = ["FAMILIES", "Cell", "Family", "Sizes", "cells", "left_out", "write_checkpoint"]
