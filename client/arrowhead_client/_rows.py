# SPDX-License-Identifier: Apache-2.0
"""Documents' fields as columns of Arrow, each of one type for all documents of an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from arrowhead_client._errors import InvalidInput

_MISFITS = (pa.ArrowException, TypeError, ValueError, OverflowError)
_WANTED = "wanted strings, numbers, booleans, dates, or lists of these, all of one type"


def new_fields(fields: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[pa.Field]:
    """The columns that an index lacks for the fields of these documents, by their ids.

    A field that is None in all of them has no type yet, and gets no column.

    Raises:
        InvalidInput: a value is of no kind that a column has, or of another kind than the others.
    """
    values: dict[str, list[Any]] = {}
    for document in fields.values():
        for name, value in document.items():
            if name not in known and value is not None:
                values.setdefault(name, []).append(value)
    return [pa.field(name, _type(name, column)) for name, column in values.items()]


def column(name: str, kind: pa.DataType, fields: Mapping[str, Mapping[str, Any]]) -> pa.Array:
    """One field of these documents; null where a document has it not.

    Raises:
        InvalidInput: a value does not fit the column; names the first.
    """
    try:
        return _fitting([document.get(name) for document in fields.values()], kind)
    except _MISFITS:
        for one, document in fields.items():
            try:
                _fitting([document.get(name)], kind)
            except _MISFITS as error:
                raise InvalidInput(
                    f"document {one!r:.80}: field {name!r} is {document.get(name)!r:.80}; the "
                    f"other documents have {kind} there"
                ) from error
        raise


def _fitting(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    met = pa.array(values)
    if not pa.types.is_null(met.type) and _family(met.type) != _family(kind):
        raise TypeError(f"{met.type} is not {kind}")
    return met.cast(kind)  # which checks; told the type at once, Arrow would cut 1.5 to 1


def _family(kind: pa.DataType) -> str:
    """Types of one family hold the same values, some not all of them."""
    if pa.types.is_list(kind):
        return f"list of {_family(kind.value_type)}"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "string" if pa.types.is_large_string(kind) else str(kind).partition("[")[0]


def _type(name: str, values: Sequence[Any]) -> pa.DataType:
    try:
        kind = pa.infer_type(values)
    except _MISFITS as error:
        raise InvalidInput(f"field {name!r} ({error}): {_WANTED}") from error
    item = kind.value_type if pa.types.is_list(kind) else kind
    if pa.types.is_nested(item) or pa.types.is_null(item):
        raise InvalidInput(f"field {name!r} is {values[0]!r:.80}: {_WANTED}")
    return kind
