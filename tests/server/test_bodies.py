# SPDX-License-Identifier: Apache-2.0
"""Bodies: how deep they are, and what they will need, told from their bytes."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge

from arrowhead_client import InvalidInput
from arrowhead_server.gateway import bodies
from arrowhead_server.gateway.bodies import MOST_DEPTH, TOKENIZED, Bodies, need
from arrowhead_server.gateway.failures import OutOfMemory, TooDeep, TooLarge, TooSlow

MUCH = 10**12
HOSTILE = st.text(st.sampled_from('[]{}"\\,:a\n ü🙂'), max_size=12)


def nested(depth: int, pair: str = "[]") -> bytes:
    return (pair[0] * depth + pair[1] * depth).encode()


@given(st.lists(HOSTILE, max_size=8), st.booleans())
def test_only_what_stands_outside_strings_counts(texts: list[str], ascii: bool) -> None:  # noqa: A002
    body = json.dumps({"inputs": texts}, ensure_ascii=ascii).encode()
    plain = json.dumps({"inputs": ["a"] * len(texts)}).encode()
    widest = max("".join(texts), default="a")
    width = 4 if widest > "\uffff" else 2 if ascii and widest > "\x7f" else 1
    assert need(body, MUCH) - (1 + 3 * width) * len(body) == need(plain, MUCH) - 4 * len(plain)


@pytest.mark.parametrize(
    ("text", "width"), [("a", 1), ("ü", 1), ("Ā", 2), ("快", 2), ("\ue000", 2), ("🙂", 4)]
)
def test_wide_characters_widen_all_beside_them(text: str, width: int) -> None:
    body = f'["{text}{"a" * 1000}"]'.encode()
    assert need(body, MUCH) == (1 + 3 * width) * len(body) + 2 * 32_768
    # Of strings made here: a single character's may carry its UTF-8 too.
    python = sys.getsizeof(text + "a" * 2000) - sys.getsizeof(text + "a" * 1000)
    assert python == 1000 * width


def _around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3)


@given(st.recursive(HOSTILE, _around))
def test_depth_is_what_the_parser_meets(value: Any) -> None:
    def depth(of: Any) -> int:
        if isinstance(of, str):
            return 0
        return 1 + max(map(depth, of.values() if isinstance(of, dict) else of), default=0)

    for around in range(MOST_DEPTH + 3):
        body = json.dumps(value)
        for _ in range(around):
            body = f"[{body}]"
        if depth(value) + around > MOST_DEPTH:
            with pytest.raises(TooDeep, match=f"nested deeper than {MOST_DEPTH} levels"):
                need(body.encode(), MUCH)
        else:
            need(body.encode(), MUCH)


@pytest.mark.parametrize("wrong", [b"]", b"[", b"][", b'{"a": [}', nested(200_000)])
def test_what_is_no_json_is_not_read_for_long(wrong: bytes) -> None:
    with pytest.raises(TooDeep, match="no JSON"):
        need(wrong, MUCH)


@pytest.mark.timeout(60)  # were one quadratic, it would take hours
@pytest.mark.parametrize(
    "unit", [b'\\"', b'"', b'"",', b"[],", b"[", b"1,", b"\\", b'\\\\"', b"{}", b'"a",']
)
def test_hostile_bytes_take_no_longer_than_others(unit: bytes) -> None:
    with suppress(TooDeep):
        need(unit * (4_000_000 // len(unit)), 512 * 10**6)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_what_the_parser_would_not_take_for_utf8_is_refused(encoding: str) -> None:
    text = '{"inputs": "a"}'
    with pytest.raises(InvalidInput, match="wanted JSON in UTF-8"):
        need(text.encode(encoding), MUCH)
    assert need(text.encode("utf-8-sig"), MUCH) > need(text.encode(), MUCH)


def test_texts_that_are_told_token_by_token_need_more() -> None:
    body = json.dumps({"inputs": ["a"] * 100}).encode()
    assert need(body, MUCH, TOKENIZED) > 3 * need(body, MUCH)


def test_more_texts_and_more_ids_need_more() -> None:
    one = need(b'{"inputs": ["a"]}', MUCH)
    assert need(b'{"inputs": ["a", "b"]}', MUCH) > one + 30_000
    ids = json.dumps({"input": [[7] * 512] * 2048}).encode()
    texts = json.dumps({"input": ["a text"] * 2048}).encode()
    assert 60e6 < need(texts, MUCH) < need(ids, MUCH) < 200e6


class Sender:
    """Sends a body as ASGI does."""

    def __init__(self, *parts: bytes, pause_s: float = 0) -> None:
        self.left = list(parts)
        self.pause_s = pause_s

    async def __call__(self) -> dict[str, Any]:
        await asyncio.sleep(self.pause_s)
        body = self.left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self.left)}


def held() -> Gauge:
    return Gauge("held", "bytes", registry=CollectorRegistry())


async def test_a_body_is_received_again_whole() -> None:
    gauge = held()
    read = Bodies(1000, 10**6, gauge)
    async with read.read(Sender(b'{"a"', b": 1", b"}")) as receive:
        assert await receive() == {"type": "http.request", "body": b'{"a": 1}', "more_body": False}
        assert gauge._value.get() > 0
    assert gauge._value.get() == 0


async def test_too_large_too_slow_too_deep_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "READ_S", 0.1)
    gauge = held()
    read = Bodies(1000, 10**6, gauge)
    for sender, error, message in (
        (Sender(b"x" * 600, b"x" * 600, b"never asked for"), TooLarge, "more than 0.001 MB"),
        (Sender(b'"a",' * 200), TooLarge, "takes 7 MB of memory to answer; wanted 1 at most"),
        (Sender(b"{", b"}", pause_s=0.08), TooSlow, "no whole body within 0.1 s"),
        (Sender(nested(17)), TooDeep, "deeper than 16"),
        (Sender(nested(17, "{}")), TooDeep, "deeper than 16"),
    ):
        with pytest.raises(error, match=message):
            async with read.read(sender):
                raise AssertionError("let in")
        assert gauge._value.get() == 0


async def test_what_others_need_is_not_given_twice() -> None:
    gauge = held()
    read = Bodies(10**6, 10**6, gauge)
    body = b'"a",' * 20  # two thirds of it
    async with read.read(Sender(body)):
        with pytest.raises(OutOfMemory, match="try again, or send fewer texts"):
            async with read.read(Sender(body)):
                raise AssertionError("let in")
        async with read.read(Sender(b'"a"')):  # there is room for a small one
            pass
    async with read.read(Sender(body)):
        pass
    assert gauge._value.get() == 0
