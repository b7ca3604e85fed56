# SPDX-License-Identifier: Apache-2.0
"""Documents' fields as columns of Arrow, each of one type for all documents of an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from arrowhead_client._errors import InvalidInput

_MISFITS = (pa.ArrowException, TypeError, ValueError, OverflowError)
_WANTED = "wanted strings, numbers, booleans, dates, or lists of these, all of one type"


def new_fields(fields: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[pa.Field]:
    """The columns that an index lacks for the fields of these documents, by their ids.

    A field that is None or an empty list in all of them has no type yet, and gets no column.

    Raises:
        InvalidInput: a value is of no kind that a column has, or of another kind than the others.
    """
    values: dict[str, list[Any]] = {}
    for document in fields.values():
        for name, value in document.items():
            if name not in known and value is not None:
                values.setdefault(name, []).append(value)
    kinds = {name: _type(name, column) for name, column in values.items()}
    return [pa.field(name, kind) for name, kind in kinds.items() if not _is_untyped(kind)]


def column(name: str, kind: pa.DataType, fields: Mapping[str, Mapping[str, Any]]) -> pa.Array:
    """One field of these documents; null where a document has it not.

    Raises:
        InvalidInput: a value does not fit the column, or the others; names the first.
    """
    try:
        return _fitting([document.get(name) for document in fields.values()], kind)
    except _MISFITS as together:
        for one, document in fields.items():
            try:
                _fitting([document.get(name)], kind)
            except _MISFITS as error:
                raise InvalidInput(
                    f"document {one!r:.80}: field {name!r} is {document.get(name)!r:.80}; the "
                    f"other documents have {kind} there"
                ) from error
        raise InvalidInput(f"field {name!r} ({together}): {_WANTED}") from together


def _fitting(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    met = pa.array([_plain(value) for value in values])
    if not _fits(met.type, kind):
        raise TypeError(f"{met.type} is not {kind}")
    return met.cast(kind)  # which checks; told the type at once, Arrow would cut 1.5 to 1


def _plain(value: Any) -> Any:
    """Decimals as floats: Arrow has no column for both, nor one for decimals yet to come."""
    if isinstance(value, Decimal):
        return float(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _fits(met: pa.DataType, kind: pa.DataType) -> bool:
    if pa.types.is_list(met) and pa.types.is_list(kind):
        return _fits(met.value_type, kind.value_type)
    return pa.types.is_null(met) or _family(met) == _family(kind)


def _family(kind: pa.DataType) -> str:
    """Types of one family hold the same values, some not all of them."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "string" if pa.types.is_large_string(kind) else str(kind).partition("[")[0]


def _type(name: str, values: Sequence[Any]) -> pa.DataType:
    try:
        kind = pa.infer_type(values)
    except _MISFITS as error:
        raise InvalidInput(f"field {name!r} ({error}): {_WANTED}") from error
    item = kind.value_type if pa.types.is_list(kind) else kind
    if pa.types.is_nested(item):
        raise InvalidInput(f"field {name!r} is {values[0]!r:.80}: {_WANTED}")
    if pa.types.is_decimal(item):  # of as many digits as these few values have: others may not fit
        return pa.list_(pa.float64()) if pa.types.is_list(kind) else pa.float64()
    return kind


def _is_untyped(kind: pa.DataType) -> bool:
    """Whether it is that of None, or of lists of nothing else."""
    return bool(pa.types.is_null(kind.value_type if pa.types.is_list(kind) else kind))
