"""Element types: safetensors' names, MLX's types, and the NumPy type of the same size that can stand in for them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

MLX_TYPE: dict[str, Any] = {
    "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "U32": mx.uint32, "I32": mx.int32,
    "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32,
}  # fmt: skip

NUMPY_TYPE: dict[str, Any] = {
    "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "F16": np.float16, "BF16": np.uint16, "F32": np.float32,
}  # fmt: skip
"""NumPy has no bfloat16: its bits travel as uint16."""

SAFETENSORS_NAME: dict[Any, str] = {mlx_type: name for name, mlx_type in MLX_TYPE.items()}
