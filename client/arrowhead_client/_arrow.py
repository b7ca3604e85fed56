# SPDX-License-Identifier: Apache-2.0
"""Arrow in and out: arrays of strings to what Triton takes, vectors to fixed-size lists.

pyarrow is imported when it is needed: it is heavy, and few calls want it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arrowhead_client._errors import InvalidInput
from arrowhead_client._texts import PackedTexts

if TYPE_CHECKING:
    import pyarrow as pa


def is_arrow(texts: object) -> bool:
    """Whether these are of pyarrow, or of another library that exports Arrow's C data interface."""
    return hasattr(texts, "__arrow_c_array__") or hasattr(texts, "__arrow_c_stream__")


def pack_strings(texts: Any, front: bytes = b"") -> PackedTexts:
    """The strings of an Arrow array as Triton takes them, each with `front`, UTF-8, in front.

    Arrow's kernels copy all bytes once, into one buffer; no Python object is made for a text.
    (Strings that do not lie in one piece as 64-bit string arrays, such as chunks, are copied twice,
    and those of a dictionary are written out.)

    Raises:
        InvalidInput: it holds something else than strings, or a null; says where.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    strings = _strings(texts).cast(pa.large_binary())  # of the same buffers
    if not len(strings):
        return PackedTexts(memoryview(b""), np.zeros(1, np.int64))
    lengths = pc.add(pc.binary_length(strings), len(front)).to_numpy().astype("<u4")
    sizes = pa.Array.from_buffers(pa.binary(4), len(lengths), [None, pa.py_buffer(lengths)])
    scalar = partial(pa.scalar, type=pa.large_binary())
    parts = [sizes.cast(pa.large_binary()), *([scalar(front)] if front else []), strings]
    joined = pc.binary_join_element_wise(*parts, scalar(b""))
    _, starts, raw = joined.buffers()
    return PackedTexts(memoryview(raw), np.frombuffer(starts, np.int64, len(joined) + 1))


def to_strings(texts: Any) -> list[str]:
    """The strings of an Arrow array.

    Raises:
        InvalidInput: as `pack_strings`.
    """
    found: list[str] = _strings(texts).to_pylist()
    return found


def to_arrow(vectors: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """[N, D] vectors as N fixed-size lists of D numbers, over the same memory.

    Only vectors that do not lie as Arrow wants them, in one piece and aligned, are copied.
    """
    import pyarrow as pa

    vectors = np.require(vectors, requirements=["C", "A"])
    kind = pa.from_numpy_dtype(vectors.dtype)
    values = pa.Array.from_buffers(kind, vectors.size, [None, pa.py_buffer(vectors)])
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def _strings(texts: Any) -> pa.LargeStringArray:
    """In one piece, with offsets of 64 bits, and without a null."""
    import pyarrow as pa

    if isinstance(texts, (pa.Array, pa.ChunkedArray)):
        array = texts
    elif hasattr(texts, "__arrow_c_stream__"):
        array = pa.chunked_array(texts)
    else:
        array = pa.array(texts)
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    wanted = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
    if kind not in wanted:
        raise InvalidInput(
            f"texts is an Arrow array of {array.type}: wanted strings (string, large_string, "
            "string_view, or a dictionary of them). Select one column, or cast it."
        )
    strings = array.cast(pa.large_string())
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"texts is an Arrow array that is broken: {error}") from error
    if strings.null_count:
        row = strings.is_null().index(True).as_py()
        raise InvalidInput(
            f"texts[{row}] is null, the first of {strings.null_count}: wanted a string. "
            "`drop_null()` leaves them out, `fill_null('')` makes them empty texts."
        )
    return strings.combine_chunks() if isinstance(strings, pa.ChunkedArray) else strings
