# SPDX-License-Identifier: Apache-2.0
"""What a caller may do to a vector once it is there: pure functions, no network.

And, because every road must agree on it too, which of two versions of a model a caller is given.

Shapes: `[..., D]` is one vector or any array of vectors, D its width; the last axis is the vector.
All results are float32, and new arrays. Sums run in float64, so no float32 input overflows.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from arrowhead_client._errors import InvalidInput

Vectors: TypeAlias = npt.NDArray[np.float32]
Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]


def normalize(vectors: npt.ArrayLike) -> Vectors:
    """The vectors scaled to length 1, float32 `[..., D]`. A zero vector stays zero.

    >>> normalize([3.0, 4.0]).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    array = _floats(vectors)
    lengths = np.sqrt(np.einsum("...d,...d->...", array, array, dtype=np.float64))[..., np.newaxis]
    return np.divide(array, np.where(lengths == 0, 1.0, lengths)).astype(np.float32)


def truncate_dimensions(vectors: npt.ArrayLike, dimensions: int) -> Vectors:
    """The first `dimensions` components, scaled to length 1 again: float32 `[..., dimensions]`.

    This is how a Matryoshka embedding is made shorter. Of a model that was not trained for it the
    short vectors are poor. A vector whose first components are all zero gives zeros.

    Raises:
        InvalidInput: `dimensions` is below 1 or above D.
    """
    array = _floats(vectors)
    return normalize(array[..., : _checked(dimensions, array.shape[-1])])


def cosine_similarity(a: npt.ArrayLike, b: npt.ArrayLike | None = None) -> Vectors:
    """The cosine of every vector of `a` with every vector of `b` (default: of `a`).

    Args:
        a: `[N, D]`, or `[D]` for one vector.
        b: `[M, D]`, or `[D]` for one vector.

    Returns:
        float32 `[N, M]`, in -1..1 up to rounding. A zero vector gives 0 with everything.

    Raises:
        InvalidInput: the widths differ, or there are more than two axes.
    """
    left = normalize(np.atleast_2d(_floats(a)))
    right = left if b is None else normalize(np.atleast_2d(_floats(b)))
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise InvalidInput(
            f"cannot compare shapes {left.shape} and {right.shape}: wanted [N, D] and [M, D]"
        )
    similarity: Vectors = left @ right.T
    return similarity


def quantize(
    vectors: npt.ArrayLike,
    precision: Precision,
    ranges: npt.ArrayLike | None = None,
    *,
    dimensions: int | None = None,
) -> npt.NDArray[Any]:
    """Vectors `[..., D]` in fewer bits; the precisions are those of sentence-transformers.

    int8, uint8: each component is the nearest of 256 steps between the lowest and the highest of
    its range, what lies outside being the first or the last: `[..., D]`. binary, ubinary: one bit a
    component, 1 where it is above 0, the first in the highest bit, as int8 (less 128) or uint8:
    `[..., ceil(D / 8)]`. A cut to `dimensions` does not rescale here: the ranges are of the whole
    vector's components, and cosines do not depend on lengths.

    Args:
        vectors: the model's own.
        precision: which; "float32" gives them as they are.
        ranges: `[2, D]`, lowest and highest of each component (`ModelInfo.ranges`).
        dimensions: keep so many components.

    Raises:
        InvalidInput: no ranges, or of another width; `dimensions` is below 1 or above D.
    """
    array = _floats(vectors)
    width = array.shape[-1]
    array = array[..., : _checked(dimensions, width)]
    if precision == "float32":
        return array.astype(np.float32)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(array > 0, axis=-1)
        return bits if precision == "ubinary" else (bits ^ np.uint8(0x80)).view(np.int8)
    low, step = _steps(ranges, width, array.shape[-1])
    codes: npt.NDArray[np.uint8] = np.rint((array - low) / step).clip(0, 255).astype(np.uint8)
    return codes if precision == "uint8" else (codes ^ np.uint8(0x80)).view(np.int8)


def dequantize(
    codes: npt.NDArray[Any], precision: Precision, ranges: npt.ArrayLike | None = None
) -> Vectors:
    """What `quantize` gave, as float32 `[..., D]` again, up to what it lost.

    Bits give 1 and -1, for D a multiple of 8.

    Raises:
        InvalidInput: no ranges, or narrower ones than the codes.
    """
    if precision == "float32":
        return np.asarray(codes, np.float32)
    unsigned = codes.view(np.uint8) ^ np.uint8(0x80 if precision in ("int8", "binary") else 0)
    if precision in ("binary", "ubinary"):
        return np.unpackbits(unsigned, axis=-1).astype(np.float32) * 2 - 1
    width = None if ranges is None else np.shape(ranges)[-1]
    low, step = _steps(ranges, width, codes.shape[-1])
    return (unsigned * step + low).astype(np.float32)


def _steps(
    ranges: npt.ArrayLike | None, width: int | None, kept: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The lowest value and the size of a step of each kept component."""
    if ranges is None:
        raise InvalidInput("the model has no ranges for int8 and uint8: convert it again")
    found = np.asarray(ranges, np.float64)
    if found.shape != (2, width) or kept > found.shape[1]:
        raise InvalidInput(f"ranges of shape {found.shape}: wanted (2, {width or kept})")
    low, high = found[:, :kept]
    return low, np.where(high > low, (high - low) / 255, 1.0)


def in_candidate(key: str, share: float) -> bool:
    """Whether the caller with this key is in the candidate's arm of an experiment.

    The first 8 bytes of blake2b of the key's UTF-8, as an unsigned big-endian integer, are below
    share * 2^64. So the answer is the same everywhere and for ever, about `share` of all keys are
    in, and raising the share only moves callers towards the candidate, never back.

    (blake2b of its full 64 bytes, cut; a digest asked for in 8 bytes would be another one.)

    Args:
        key: names one caller, such as an agent or a user. Never a text: the vectors of two versions
            are not comparable, so all vectors of one caller must come from one of them.
        share: 0 is nobody, 1 is everybody.

    Raises:
        InvalidInput: `share` is no number in 0..1, or `key` is empty, no string, or has no UTF-8.

    >>> [in_candidate("agent-7", share) for share in (0.0, 0.5, 1.0)]
    [False, True, True]
    """
    if (
        isinstance(share, bool)
        or not isinstance(share, (int, float, np.floating))
        or not 0 <= share <= 1
    ):
        raise InvalidInput(f"share={share!r}: wanted a number in 0..1, the candidate's part of all")
    if not isinstance(key, str) or not key:
        raise InvalidInput(f"key={key!r}: wanted a string that names one caller, such as 'agent-7'")
    try:
        digest = blake2b(key.encode("utf-8")).digest()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"key={key!r} has no UTF-8: {error.reason}") from error
    # A whole number with a float of a power of two: exact, so a share of 1 leaves nobody out.
    return int.from_bytes(digest[:8], "big") < float(share) * 2.0**64


def _checked(dimensions: int | None, width: int) -> int:
    """How many components are kept."""
    if dimensions is None:
        return width
    if not 1 <= dimensions <= width:
        raise InvalidInput(
            f"dimensions={dimensions}, but the vectors have {width}: wanted 1..{width}"
        )
    return dimensions


def _floats(vectors: npt.ArrayLike) -> npt.NDArray[Any]:
    """The vectors as a float array: floats as they are, whole numbers as float32."""
    array = np.asarray(vectors)
    if array.ndim == 0 or array.dtype.kind not in "fiu":
        raise InvalidInput(
            f"not vectors: shape {array.shape}, dtype {array.dtype}; wanted numbers [..., D]"
        )
    return array if array.dtype.kind == "f" else array.astype(np.float32)
