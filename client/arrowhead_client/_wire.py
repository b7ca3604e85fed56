# SPDX-License-Identifier: Apache-2.0
"""The bytes of a tensor as the inference protocol has them, read into an array.

What a server says of its answer is believed of nothing: type, shape and content must fit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

MOST_BYTES = 256 << 20  # of an answer; a hundred texts take a few MB, a tokenizer some ten


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
            return shaped(np.asarray(deserialize_bytes_tensor(content)), shape)
        except struct.error as error:
            raise ValueError(f"a BYTES tensor whose lengths do not fit: {error}") from error
    return shaped(np.frombuffer(content, dtype_of(kind)), shape)


def listed(kind: str, shape: Sequence[int], values: Any) -> npt.NDArray[Any]:
    """The same of a tensor whose elements stand in JSON.

    Raises:
        ValueError, TypeError: they do not fit type and shape.
    """
    wanted = dtype_of(kind)
    with np.errstate(all="ignore"):  # what is too large shows below, or as an infinite number
        array = np.array(values, wanted if np.dtype(wanted).kind in "fO" else None)
        cast = array.astype(wanted, copy=False)
    if cast is not array and not np.array_equal(cast, array):  # numpy would wrap them, or cut
        raise ValueError(f"numbers that are no {kind}")
    return shaped(cast, shape)


def shaped(array: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
    """The array in this shape, which must say the size of each axis itself.

    Raises:
        ValueError: it does not, or there are more elements, or fewer.
    """
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a shape of {shape!r:.80}")
    return array.reshape(shape)


def dtype_of(kind: str) -> npt.DTypeLike:
    """What numpy calls Triton's type.

    Raises:
        ValueError: it is none of Triton's.
    """
    found: npt.DTypeLike = triton_to_np_dtype(kind)
    if found is None:
        raise ValueError(f"a tensor of type {kind!r}")
    return found
