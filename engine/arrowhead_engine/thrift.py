# SPDX-License-Identifier: Apache-2.0
"""Thrift's compact protocol, of which Parquet's footer and page headers are made; reading only.

A struct is its fields, then a zero byte. A field is one byte, how far its number is from that of
the field before (4 bits) and its type (4 bits), and the value:

    integer  a varint, seven bits a byte, lowest first; 0, 1, 2, 3, ... stand for 0, -1, 1, -2, ...
    binary   its length as a varint, and the bytes
    list     one byte, how many (4 bits; 15: a varint follows) and their type (4 bits); the values
    struct   its fields, and the zero byte

Every value takes at least a byte, and nothing is made room for before it was met: time and memory
are in proportion to the bytes given. Where they end too early an `IndexError` says so.

A value ends where its own bytes say: a regular expression that matches from its start on has found
its end. `VARINT` is an integer's part of such a pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

T = TypeVar("T")
Fields = dict[int, Any]  # field number << 4 | type -> int, bool, bytes, or what a reader made of it
Reader = Callable[[bytes, int], tuple[Any, int]]  # bytes and a place -> a value and where it ends

_WIDTHS = {TRUE: 1, FALSE: 1, BYTE: 1, DOUBLE: 8}  # bytes, within a list
_MOST_BITS = 64  # of a varint
_MOST_NUMBER = 1000  # of a field; Parquet's end below 20
_MOST_DEPTH = 16
_NONE: Mapping[int, Reader] = {}

VARINT = rb"[\x80-\xff]{0,9}[\x00-\x7f]"


class Malformed(Exception):
    """The bytes are not Thrift's, or nest deeper than any Parquet file's."""


def struct(
    raw: bytes,
    at: int,
    readers: Mapping[int, Reader] = _NONE,
    starts: dict[int, int] | None = None,
) -> tuple[Fields, int]:
    """The struct that starts at `at`, and where it ends.

    Args:
        raw: the bytes.
        at: where the struct starts.
        readers: what reads a list or a struct within it, by field; others come as their bytes.
        starts: is told where each field starts.

    Raises:
        Malformed, IndexError: these bytes are none.
    """
    fields: Fields = {}
    number = 0
    while True:
        start, head = at, raw[at]
        at += 1
        if head > 15:
            number += head >> 4
        elif head:
            number, at = integer(raw, at)
        else:
            return fields, at
        if not 0 < number <= _MOST_NUMBER:
            raise Malformed(f"a field of number {number}")
        kind = head & 15
        field = number << 4 | kind
        if starts is not None:
            starts[field] = start
        if field in readers:
            fields[field], at = readers[field](raw, at)
        elif kind in (I16, I32, I64):
            fields[field], at = integer(raw, at)
        elif kind in (TRUE, FALSE):
            fields[field] = kind == TRUE
        elif kind == BINARY:
            fields[field], at = binary(raw, at)
        else:
            end = _skip(raw, at, kind, 0)
            fields[field], at = raw[at:end], end


def sequence(
    raw: bytes, at: int, read: Callable[[bytes, int], tuple[T, int]], most: int | None = None
) -> tuple[list[T], int]:
    """The list that starts at `at`, and where it ends; `read` takes each value.

    Raises:
        Malformed, IndexError: these bytes are none, or it has more than `most` values.
    """
    count, _, at = list_head(raw, at)
    if most is not None and count > most:
        raise Malformed(f"a list of {count} values, {most} at most")
    values = []
    for _ in range(count):
        value, at = read(raw, at)
        values.append(value)
    return values, at


def varint(raw: bytes, at: int) -> tuple[int, int]:
    """The varint that starts at `at`, taken for a number without sign, and where it ends."""
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift >= _MOST_BITS:
            raise Malformed("an integer of more than 64 bits")


def integer(raw: bytes, at: int) -> tuple[int, int]:
    """The integer that starts at `at`, and where it ends."""
    value, at = varint(raw, at)
    return value >> 1 ^ -(value & 1), at


def binary(raw: bytes, at: int) -> tuple[bytes, int]:
    """The bytes that start with their length at `at`, and where they end."""
    length, at = varint(raw, at)
    end = _within(raw, at + length)
    return raw[at:end], end


def list_head(raw: bytes, at: int) -> tuple[int, int, int]:
    """How many values, of which type, and where the first starts."""
    head = raw[at]
    at += 1
    count = head >> 4
    if count == 15:
        count, at = varint(raw, at)
    _within(raw, at + count)  # each value takes a byte or more
    return count, head & 15, at


def _skip(raw: bytes, at: int, kind: int, depth: int) -> int:
    """Where the value of that type that starts at `at` ends."""
    if depth > _MOST_DEPTH:
        raise Malformed(f"values within values, more than {_MOST_DEPTH} deep")
    if kind in (I16, I32, I64):
        return varint(raw, at)[1]
    if kind == BINARY:
        return binary(raw, at)[1]
    if kind in (LIST, SET):
        count, of, at = list_head(raw, at)
        if of in _WIDTHS:
            return _within(raw, at + count * _WIDTHS[of])
        for _ in range(count):
            at = _skip(raw, at, of, depth + 1)
        return at
    if kind == STRUCT:
        while head := raw[at]:
            at += 1
            if head < 16:
                _, at = varint(raw, at)
            if head & 15 > FALSE:
                at = _skip(raw, at, head & 15, depth + 1)
        return at + 1
    if kind in _WIDTHS:
        return _within(raw, at + _WIDTHS[kind])
    raise Malformed(f"a value of type {kind}, which Parquet does not use")


def _within(raw: bytes, end: int) -> int:
    if end > len(raw):
        raise IndexError("ends too early")
    return end
