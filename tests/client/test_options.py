# SPDX-License-Identifier: Apache-2.0
"""What may be wanted of texts and vectors, by both clients over the fake transports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowhead_client import (
    AsyncClient,
    AsyncFakeTransport,
    Client,
    FakeTransport,
    InvalidInput,
    Options,
    TextTooLong,
    quantize,
)
from arrowhead_client._options import longest_end

LONG = " ".join(f"word{number}" for number in range(1000))


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Any:
    async def call(fake: FakeTransport, method: str, *args: Any, **options: Any) -> Any:
        if request.param == "sync":
            with Client(transport=fake) as client:
                return getattr(client, method)(*args, **options)
        async with AsyncClient(transport=AsyncFakeTransport(fake)) as client:
            return await getattr(client, method)(*args, **options)

    return call


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({}, b"a", b"a"),
        ({"query": "q: ", "passage": "p: "}, b"q: a", b"p: a"),
        ({"search_query": "s: ", "search_document": "d: "}, b"s: a", b"d: a"),
        ({"query": "ask: ", "clustering": "c: "}, b"ask: a", b"a"),
    ],
)
async def test_an_input_type_is_the_models_prompt_for_it(
    call: Any, prompts: dict[str, str], query: bytes, document: bytes
) -> None:
    fake = FakeTransport(prompts=prompts)
    await call(fake, "embed", "a", input_type="query")
    await call(fake, "embed_arrow", "a", input_type="document")
    assert [request.texts for request in fake.requests] == [(query,), (document,)]
    await call(fake, "similarity", "a", ["a"], a_input_type="query", b_input_type="document")
    assert [request.texts for request in fake.requests[2:]] == [(query,), (document,)]


async def test_a_text_that_is_too_long_is_cut_where_it_is_wanted(call: Any) -> None:
    fake = FakeTransport(prompts={"query": "q: "})  # it counts words, and reads 256
    await call(fake, "embed", ["a", LONG], truncate="start", prompt_name="query")
    end = " ".join(f"word{number}" for number in range(1000 - 255, 1000))
    assert fake.requests[-1].texts == (b"q: a", f"q: {end}".encode())
    with pytest.raises(TextTooLong, match="text 1 has more than the 256 tokens"):
        await call(fake, "embed", ["a", LONG], truncate="none")
    await call(fake, "embed", LONG)
    assert fake.requests[-1].texts == (LONG.encode(),)


@given(st.text("ab \n.", max_size=300), st.integers(1, 40))
def test_the_longest_end_fits_and_no_longer_one_of_words_does(text: str, limit: int) -> None:
    def too_long(some: str) -> bool:
        return len(some.split()) > limit

    if not too_long(text):
        return
    search = longest_end(text, limit)
    asked, candidates = 0, next(search)
    try:
        while True:
            asked += 1
            candidates = search.send([too_long(some) for some in candidates])
    except StopIteration as found:
        end = found.value
    assert text.endswith(end)
    assert not too_long(end)
    assert asked <= 4
    words = len(end.split())
    assert words == limit or (words < limit and len(text.split()[-words - 1]) > 0)
    assert words >= limit - 1


async def test_vectors_in_fewer_bits_are_the_algebras(call: Any) -> None:
    fake = FakeTransport()
    whole = await call(fake, "embed", ["a", "b"])
    found = (await call(fake, "info")).ranges
    for precision in ("int8", "uint8", "binary", "ubinary"):
        met = await call(fake, "embed", ["a", "b"], precision=precision, dimensions=4)
        np.testing.assert_array_equal(met, quantize(whole, precision, found, dimensions=4))
        one = await call(fake, "embed", "a", precision=precision, dimensions=4)
        np.testing.assert_array_equal(one, met[0])


async def test_ids_go_to_the_encoder_of_the_pinned_version(call: Any) -> None:
    fake = FakeTransport()
    vectors = await call(fake, "embed_ids", [[1, 2, 3], [4]], dimensions=2)
    assert vectors.shape == (2, 2)
    (request,) = fake.requests
    assert (request.model, request.version, request.texts) == ("minilm_encoder", 1, ())
    ids, length = request.inputs()
    assert ids == ("input_ids", "INT32", (2, 3), np.array([1, 2, 3, 4, 0, 0], "<i4").tobytes())
    assert length == ("length", "INT32", (2, 1), np.array([3, 1], "<i4").tobytes())
    assert (await call(fake, "embed_ids", [])).shape == (0, 8)


@pytest.mark.parametrize("ids", [[[]], [["a"]], [[1, [2]]], [[-1]], [[2**31]], [[1.5]], [[True]]])
async def test_what_are_no_ids(call: Any, ids: Any) -> None:
    with pytest.raises(InvalidInput, match=r"input_ids\[0\]"):
        await call(FakeTransport(), "embed_ids", ids)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"truncate": "left"}, "truncate='left': wanted one of 'end', 'start', 'none'"),
        ({"precision": "int4"}, "precision='int4': wanted one of 'float32', 'int8'"),
        ({"input_type": "question"}, "wanted one of 'query', 'document'"),
        ({"input_type": "query", "prompt": ""}, "give one of them"),
        ({"dimensions": 0}, r"dimensions=0: wanted 1\.\."),
        ({"dimensions": True}, "wanted a whole number"),
    ],
)
def test_wishes_that_cannot_be_meant(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Options(**wish)
