# SPDX-License-Identifier: Apache-2.0
"""Sound JSON, spoilt: values exchanged, keys taken away, texts cut, and nests without end."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

_DEEP = "@deep@"
DEEP = 100_000
_NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32 + 1, -(2**31) - 1, 2**63, 10**30),
    *(0.5, -0.0, 1e-9, 1e39, 1e308, float("nan"), float("inf"), float("-inf")),
)
_STRINGS = (
    "",
    "a",
    "BYTES",
    "INT32",
    "FP32",
    "FP16",
    "BF16",
    "BOOL",
    "FP64",
    "\x00",
    "\ud800",
    "é🙂",
)
_SCALARS = st.one_of(
    st.sampled_from(_NUMBERS),
    st.integers(),
    st.sampled_from(_STRINGS),
    st.text(max_size=8),
    st.sampled_from([None, True, False, _DEEP]),
)
_VALUES: st.SearchStrategy[Any] = st.one_of(
    _SCALARS,
    st.lists(_SCALARS, max_size=4),
    st.lists(st.lists(_SCALARS, max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=8), _SCALARS, max_size=3),
    st.sampled_from([[], {}, [[]], [{}], [None]]),
)
_EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.sampled_from(["replace", "replace", "replace", "remove", "double", "rename"]),
        _VALUES,
    ),
    max_size=3,
)
# Of the text: how much of its end is cut off, and bytes put over others.
_CUTS = st.one_of(st.just(0), st.integers(0, 40))
_BYTES = st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), max_size=2)


@st.composite
def edited(draw: st.DrawFn, base: Any, depth: int = DEEP) -> bytes:
    """The JSON of `base` after some edits, mostly still JSON; lists nest `depth` deep at most."""
    document = [copy.deepcopy(base)]
    for place, edit, value in draw(_EDITS):
        _apply(document, place, edit, value)
    text = json.dumps(document[0] if document else None)
    text = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth)
    raw = bytearray(text.encode("utf-8", "replace"))
    del raw[len(raw) - min(draw(_CUTS), len(raw)) :]
    for place, value in draw(_BYTES):
        if raw:
            raw[place % len(raw)] = value
    return bytes(raw)


def _apply(document: list[Any], place: int, edit: str, value: Any) -> None:
    """Edits one of the places in the document, which stands alone in a list."""
    places = list(_places(document))
    if not places:
        return
    owner, key = places[place % len(places)]
    if edit == "replace":
        owner[key] = copy.deepcopy(value)
    elif edit == "remove":
        del owner[key]
    elif isinstance(owner, list):
        if owner is not document:
            owner.insert(key, copy.deepcopy(owner[key]))
    elif edit == "rename":
        owner[str(value)[:20]] = owner.pop(key)
    else:
        owner[f"{key} again"] = copy.deepcopy(owner[key])


def _places(inside: Any) -> Any:
    """Each value within, as what it stands in and where."""
    pairs = inside.items() if isinstance(inside, dict) else enumerate(inside)
    for key, value in list(pairs):
        yield inside, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
