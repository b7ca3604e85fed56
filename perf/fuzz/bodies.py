# SPDX-License-Identifier: Apache-2.0
"""What the gateway reckons of a body before it parses it, held against what parsing makes of it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from arrowhead_client import ArrowheadError
from arrowhead_server.gateway.bodies import MOST_DEPTH, PER_TEXT, need
from perf.fuzz.json_edits import edited
from perf.fuzz.target import Target, plain

_PIECES = st.sampled_from(
    [
        *(b"[", b"]", b"{", b"}", b'"', b"\\", b'\\"', b"\\\\", b",", b":", b"1", b"null", b" "),
        *(
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"\x00",
            b"\xf0\x9f\x99\x82",
            b"\\ud83d\\ude42",
            b'"a"',
            b"[]",
        ),
        *(b'"[["', b'"]]"', b'"\\\\"', b'"\\""', b"[" * 17, b"]" * 17, b'"a":', b"\xc3\xa9"),
    ]
)
_BASE = {"inputs": ["a", 'quoted "', "back\\slash", "[[[", "é🙂", ["b", [1, 2]]], "truncate": True}
_BODIES = st.one_of(
    st.lists(_PIECES, max_size=40).map(b"".join), edited(_BASE), st.binary(max_size=60)
)


def _check(body: bytes) -> None:
    try:
        needed = need(body, 10**12)
    except ArrowheadError as error:
        assert str(error)
        return
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        assert not isinstance(error, RecursionError), "parsed as deep as that"
        return
    depth, strings, lists = _measured(document)
    assert depth <= MOST_DEPTH, f"{depth} levels were let in"
    assert needed >= PER_TEXT * max(strings, lists), (
        f"{needed} for {strings} strings, {lists} lists"
    )


def _measured(document: Any) -> tuple[int, int, int]:
    """Levels, strings and lists within."""
    if isinstance(document, str):
        return 0, 1, 0
    if not isinstance(document, (list, dict)):
        return 0, 0, 0
    inner = [
        _measured(one) for one in (document.values() if isinstance(document, dict) else document)
    ]
    return (
        1 + max((depth for depth, _, _ in inner), default=0),
        sum(strings for _, strings, _ in inner),
        isinstance(document, list) + sum(lists for _, _, lists in inner),
    )


BODIES = Target(
    "gateway: bodies",
    "What is let in is no deeper than the limit, and has memory reckoned for each of its texts.",
    _BODIES,
    plain(_check),
)
