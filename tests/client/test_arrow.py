# SPDX-License-Identifier: Apache-2.0
"""Arrow in and out: what is sent, what is refused, and which memory the vectors lie in."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from arrowhead_client import (
    AsyncClient,
    AsyncFakeTransport,
    Client,
    FakeTransport,
    InvalidInput,
    Request,
)
from arrowhead_client._arrow import pack_strings, to_arrow
from arrowhead_client._plan import encode_texts

TEXTS = ["a text", "", "grüße, 世界 \U0001f680", "nul \0 inside", "a text", "x" * 300]

FORMS: dict[str, Callable[[list[str]], Any]] = {
    "string": lambda texts: pa.array(texts, pa.string()),
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
    "string_view": lambda texts: pa.array(texts, pa.string_view()),
    "dictionary": lambda texts: pa.array(texts, pa.string()).dictionary_encode(),
    "slice": lambda texts: pa.array(["before", *texts, "behind"])[1:-1],
    "chunks": lambda texts: pa.chunked_array(
        [texts[:2], [], texts[2:]], pa.dictionary(pa.int32(), pa.string())
    ),
    "no chunks, or one": lambda texts: pa.chunked_array([texts] if texts else [], pa.string()),
    "another library's array": lambda texts: Foreign(pa.array(texts, pa.string())),
    "another library's column": lambda texts: ForeignColumn(pa.chunked_array([texts], pa.string())),
}


class Foreign:
    """What another library shows of its array: Arrow's C data interface, and no more."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return self._array.__arrow_c_array__(requested_schema)


class ForeignColumn(Foreign):
    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._array.__arrow_c_stream__(requested_schema)


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`call(fake, method, texts, ...)` of either client."""

    def sync(fake: FakeTransport, method: str, *args: Any, **options: Any) -> Any:
        with Client(transport=fake, batch_size=4) as client:
            return getattr(client, method)(*args, **options)

    async def in_loop(fake: FakeTransport, method: str, *args: Any, **options: Any) -> Any:
        async with AsyncClient(transport=AsyncFakeTransport(fake), batch_size=4) as client:
            return await getattr(client, method)(*args, **options)

    if request.param == "sync":
        return sync
    return lambda *args, **options: asyncio.run(in_loop(*args, **options))


@pytest.mark.parametrize("form", FORMS)
def test_arrow_goes_the_way_of_a_list(call: Any, form: str) -> None:
    listed, arrow = FakeTransport(), FakeTransport()
    for method, options in (
        ("embed", {}),
        ("embed", {"prompt": "grüß: ", "dimensions": 3}),
        ("count_tokens", {}),
        ("similarity", {}),
    ):
        wanted = call(listed, method, TEXTS, **options)
        met = call(arrow, method, FORMS[form](TEXTS), **options)
        np.testing.assert_array_equal(met, wanted)
    assert [_sent(one) for one in arrow.requests] == [_sent(one) for one in listed.requests]
    assert call(arrow, "embed", FORMS[form]([])).shape == (0, 8)


def _sent(request: Request) -> Any:
    return request.model, request.inputs(), list(request.texts), len(request), request.outputs


@pytest.mark.parametrize("truncate", ["none", "start"])
def test_arrow_is_cut_as_a_list_is(call: Any, truncate: Any) -> None:
    texts = ["short", " ".join(f"w{number}" for number in range(300))]
    if truncate == "none":
        with pytest.raises(InvalidInput, match="text 1 has more than the 256 tokens"):
            call(FakeTransport(), "embed", pa.array(texts), truncate=truncate)
        return
    wanted = call(FakeTransport(), "embed", texts, truncate=truncate)
    met = call(FakeTransport(), "embed", pa.array(texts), truncate=truncate)
    np.testing.assert_array_equal(met, wanted)


def test_similarity_takes_arrow_on_either_side(call: Any) -> None:
    met = call(FakeTransport(), "similarity", "a", pa.array(["b", "a"]))
    np.testing.assert_array_equal(met, call(FakeTransport(), "similarity", "a", ["b", "a"]))


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(
    st.lists(st.lists(st.none() | _texts, max_size=6), max_size=4),
    st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), None]),
    st.integers(0, 5),
    st.integers(0, 25),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=2),
)
def test_chunks_of_anything_pack_as_tritons_client_packs_them(
    chunks: list[list[str | None]], kind: Any, start: int, count: int, prompt: str
) -> None:
    kind = kind or pa.dictionary(pa.int8(), pa.string())
    array = pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string())
    array = array.cast(kind).slice(start, count)
    texts = [text for chunk in chunks for text in chunk][start : start + count]
    if None in texts:
        with pytest.raises(InvalidInput, match=rf"texts\[{texts.index(None)}\] is null"):
            encode_texts(array, prompt)
        return
    encoded = [f"{prompt}{text}".encode() for text in texts]
    found = encode_texts(array, prompt)
    assert list(found) == encoded
    for first in range(0, len(texts), 3):
        some = np.array(encoded[first : first + 3], np.object_)
        assert found[first : first + 3].packed() == serialize_byte_tensor(some).item()


def test_a_prompt_that_has_no_utf8_is_not_sent(call: Any) -> None:
    with pytest.raises(InvalidInput, match=r"\(prompt in front\) has a lone surrogate"):
        call(FakeTransport(), "embed", pa.array(["a"]), prompt="\ud800")


def test_packed_texts_are_a_sequence() -> None:
    texts = pack_strings(pa.array(["a", "b", "c", "d"]))
    assert (texts[0], texts[-1], list(texts[1:3][:1])) == (b"a", b"d", [b"b"])
    assert list(texts[3:1]) == []
    with pytest.raises(IndexError):
        texts[4]
    with pytest.raises(ValueError, match="neighbouring"):
        texts[::2]


def test_no_object_is_made_for_a_text() -> None:
    """The memory of 100,000 texts is that of their bytes, and 8 more for where each begins."""
    array = pa.array([f"text {number:06}" for number in range(100_000)])
    pack_strings(array[:1])  # imports
    tracemalloc.start()
    texts = pack_strings(array)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(texts) == 100_000
    assert held < 100_000
    assert peak < 16 * 100_000  # the lengths; one object would be 44 bytes a text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (pa.array(["a", None, "b", None]), r"texts\[1\] is null, the first of 2: .*fill_null"),
        (pa.array(["a", None])[1:], r"texts\[0\] is null"),
        (pa.chunked_array([["a"], ["b", None]]), r"texts\[2\] is null"),
        (
            pa.DictionaryArray.from_arrays(pa.array([0, 0, 1]), pa.array(["x", None])),
            r"texts\[2\] is null",
        ),
        (pa.array([None]), r"texts\[0\] is null"),
        (pa.array([1, 2]), "array of int64: wanted strings"),
        (pa.array([b"a"]), "array of binary: wanted strings"),
        (pa.array([1, 1]).dictionary_encode(), "wanted strings"),
        (pa.table({"text": ["a"]}), "array of struct<text: string>: .* Select one column"),
        (pa.record_batch({"text": ["a"]}), "array of struct<text: string>"),
        (
            pa.Array.from_buffers(
                pa.string(), 2, [None, pa.py_buffer(np.int32([0, 1, 2])), pa.py_buffer(b"a\xff")]
            ),
            "broken: .*UTF8 .*index 1",
        ),
    ],
)
def test_what_is_no_text_is_not_sent(call: Any, texts: Any, message: str) -> None:
    fake = FakeTransport()
    with pytest.raises(InvalidInput, match=message):
        call(fake, "embed_arrow", texts)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("precision", "kind", "width"),
    [
        ("float32", pa.float32(), 16),
        ("int8", pa.int8(), 16),
        ("uint8", pa.uint8(), 16),
        ("binary", pa.int8(), 2),
        ("ubinary", pa.uint8(), 2),
    ],
)
def test_arrow_out_is_typed_by_precision(call: Any, precision: Any, kind: Any, width: int) -> None:
    array = call(FakeTransport(16), "embed_arrow", pa.array(TEXTS), precision=precision)
    assert array.type == pa.list_(kind, width)
    wanted = call(FakeTransport(16), "embed", TEXTS, precision=precision)
    assert array.to_pylist() == wanted.tolist()
    array.validate(full=True)
    assert call(FakeTransport(16), "embed_arrow", [], precision=precision).type == array.type


def test_one_answer_is_not_copied(call: Any) -> None:
    vectors = np.ones((2, 8), np.float32)
    fake = FakeTransport(answer=lambda request: {"embeddings": vectors})
    array = call(fake, "embed_arrow", pa.array(["a", "b"]))
    assert array.values.buffers()[1].address == vectors.ctypes.data


def test_the_vectors_of_many_answers_are_copied_once() -> None:
    """Into one array, over which Arrow's lies: the memory is that of N x D floats."""
    answer = {"embeddings": np.ones((100, 384), np.float32)}
    texts = pa.array([""] * 10_000)
    nbytes = 10_000 * 384 * 4
    with Client(transport=FakeTransport(answer=lambda _: answer), batch_size=100) as client:
        client.embed_arrow(texts[:200])  # imports
        arrows = pa.total_allocated_bytes()
        tracemalloc.start()
        array = client.embed_arrow(texts)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(array) == 10_000
    assert nbytes <= held <= peak < 1.1 * nbytes
    assert pa.total_allocated_bytes() - arrows < 0.1 * nbytes


def test_vectors_that_arrow_cannot_lie_over_are_copied() -> None:
    raw = b"." + np.arange(6, dtype=np.float32).tobytes()
    unaligned = np.frombuffer(raw, np.float32, offset=1).reshape(2, 3)
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for vectors in (unaligned, turned):
        array = to_arrow(vectors)
        assert array.to_pylist() == vectors.tolist()
        assert array.values.buffers()[1].address % 8 == 0


def test_vectors_may_be_written_to(call: Any) -> None:
    """`embed` gives an array of the caller's own, also where an answer is read-only."""
    vectors = np.ones((2, 8), np.float32)
    vectors.flags.writeable = False
    fake = FakeTransport(answer=lambda request: {"embeddings": vectors})
    call(fake, "embed", ["a", "b"])[0, 0] = 7
    assert vectors[0, 0] == 1


@pytest.mark.parametrize("form", FORMS)
def test_arrow_over_every_road(road: Any, expected: Any, form: str) -> None:
    array = road.call("embed_arrow", FORMS[form](TEXTS), batch_size=4)
    assert array.type == pa.list_(pa.float32(), 8)
    np.testing.assert_array_equal(array.to_pylist(), expected(TEXTS))
    seen = [text for request in road.server.script.seen for text in request.texts]
    assert sorted(seen) == sorted(encode_texts(TEXTS))


def test_one_answer_over_every_road(road: Any, expected: Any) -> None:
    """HTTP's answers lie unaligned: what is given to Arrow does not. gRPC's are not copied."""
    array = road.call("embed_arrow", pa.array(TEXTS))
    np.testing.assert_array_equal(array.to_pylist(), expected(TEXTS))
    memory = array.values.buffers()[1]
    assert memory.address % 8 == 0
    if "grpc" in road.name:
        assert not memory.is_mutable  # the answer's own bytes; a copy could be written to
    assert road.call("embed", TEXTS).flags.writeable
