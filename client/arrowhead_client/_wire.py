# SPDX-License-Identifier: Apache-2.0
"""The bytes of a tensor as the inference protocol has them, read into an array."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype


def read(kind: str, shape: Sequence[int], content: bytes | memoryview) -> npt.NDArray[Any]:
    """The tensor as an array over these bytes, read-only; BYTES as an array of `bytes`.

    Args:
        kind: Triton's name of its type.
        shape: as the answer tells it.
        content: exactly its bytes.

    Raises:
        ValueError: they do not fit type and shape.
    """
    if kind == "BYTES":
        try:
            return np.asarray(deserialize_bytes_tensor(content)).reshape(shape)
        except struct.error as error:
            raise ValueError(f"a BYTES tensor whose lengths do not fit: {error}") from error
    return np.frombuffer(content, dtype_of(kind)).reshape(shape)


def dtype_of(kind: str) -> npt.DTypeLike:
    """What numpy calls Triton's type.

    Raises:
        ValueError: it is none of Triton's.
    """
    found: npt.DTypeLike = triton_to_np_dtype(kind)
    if found is None:
        raise ValueError(f"a tensor of type {kind!r}")
    return found
