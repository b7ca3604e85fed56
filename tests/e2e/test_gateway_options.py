# SPDX-License-Identifier: Apache-2.0
"""What the gateway can be asked for beside texts: prompts, cuts, precisions, ids and tokens."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from arrowhead_client import Client, cosine_similarity
from arrowhead_server.supervisor import Server

from .gateways import started, stopped

LONG = " ".join(f"word{number}" for number in range(1000))


@pytest.fixture(scope="module")
def ask(prompted: Server) -> Iterator[httpx.Client]:
    process, url = started(f"--url={prompted.grpc_url}")
    with httpx.Client(base_url=url, timeout=30) as ask:
        yield ask
    stopped(process)


@pytest.fixture(scope="module")
def client(prompted: Server) -> Iterator[Client]:
    with Client(prompted.grpc_url) as client:
        yield client


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def openai(ask: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = ok(ask.post("/v1/embeddings", json={"model": "minilm", **body}))[
        "data"
    ]
    return data


def close(met: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(met, np.float32), wanted, atol=1e-6)


@pytest.mark.parametrize("wish", [{"prompt_name": "query"}, {"input_type": "query"}])
def test_prompts_by_name_and_by_type(
    ask: httpx.Client, client: Client, wish: dict[str, str]
) -> None:
    wanted = client.embed(["query: a cat", "query: a dog"])
    texts = ["a cat", "a dog"]
    close(ok(ask.post("/embed", json={"inputs": texts, **wish})), wanted)
    close([one["embedding"] for one in openai(ask, input=texts, **wish)], wanted)
    plain = {"inputs": texts, "input_type": "document"}  # it has no prompt for these
    close(ok(ask.post("/embed", json=plain)), client.embed(texts))


@pytest.mark.parametrize(
    ("parameters", "sides"),
    [
        ({"source_input_type": "query", "sentences_input_type": "document"}, ("query: ", "")),
        ({"source_prompt_name": "query"}, ("query: ", "")),
        ({"prompt_name": "query"}, ("query: ", "query: ")),
        ({"prompt_name": "query", "sentences_input_type": "document"}, ("query: ", "")),
        (None, ("", "")),
    ],
)
def test_each_side_of_a_similarity_has_its_prompt(
    ask: httpx.Client, client: Client, parameters: Any, sides: tuple[str, str]
) -> None:
    inputs = {"source_sentence": "a cat", "sentences": ["a kitten", "a dog"]}
    response = ask.post("/similarity", json={"inputs": inputs, "parameters": parameters})
    left = client.embed([sides[0] + "a cat"])
    right = client.embed([sides[1] + text for text in inputs["sentences"]])
    close(ok(response), cosine_similarity(left, right)[0])
    counts = (
        client.count_tokens([sides[0] + "a cat"]),
        client.count_tokens([sides[1] + text for text in inputs["sentences"]]),
    )
    assert int(response.headers["x-compute-tokens"]) == sum(c.length.sum() for c in counts)


def test_texts_that_are_too_long_are_cut_where_it_is_wanted(
    ask: httpx.Client, client: Client
) -> None:
    body: dict[str, Any] = {"inputs": ["a", LONG], "truncate": True, "prompt_name": "query"}
    cut = ask.post("/embed", json={**body, "truncation_direction": "Left"})
    wanted = client.embed(["a", LONG], prompt_name="query", truncate="start")
    close(ok(cut), wanted)
    assert cut.headers["x-truncated"] == "1"
    close(ok(ask.post("/embed", json=body)), client.embed(["a", LONG], prompt_name="query"))
    met = openai(ask, input=["a", LONG], truncate="start", prompt_name="query")
    close([one["embedding"] for one in met], wanted)
    assert [one["truncated"] for one in met] == [False, True]
    assert met[0]["tokens"] == 5
    assert 250 < met[1]["tokens"] <= 256


@pytest.mark.parametrize("kind", ["int8", "uint8", "binary", "ubinary"])
def test_vectors_in_fewer_bits(ask: httpx.Client, client: Client, kind: Any) -> None:
    wanted = client.embed(["a cat", "a dog"], precision=kind, dimensions=64)
    body = {"inputs": ["a cat", "a dog"], "output_dtype": kind, "dimensions": 64}
    assert ok(ask.post("/embed", json=body)) == wanted.tolist()
    met = openai(ask, input=["a cat", "a dog"], output_dtype=kind, dimensions=64)
    assert [one["embedding"] for one in met] == wanted.tolist()
    met = openai(ask, input="a cat", output_dtype=kind, dimensions=64, encoding_format="base64")
    raw = base64.b64decode(met[0]["embedding"])
    assert np.frombuffer(raw, wanted.dtype).tolist() == wanted[0].tolist()


def test_tokens_and_their_ids(ask: httpx.Client, client: Client) -> None:
    (tokens,) = ok(ask.post("/tokenize", json={"inputs": "a naïve cat"}))
    assert [token["text"] for token in tokens] == ["[CLS]", "a", "naïve", "cat", "[SEP]"]
    assert tokens[2] == {"id": 15743, "text": "naïve", "special": False, "start": 2, "stop": 7}
    assert (tokens[0]["special"], tokens[0]["start"]) == (True, None)
    bare = {"inputs": ["a naïve cat"], "add_special_tokens": False, "prompt_name": "query"}
    (prompted,) = ok(ask.post("/tokenize", json=bare))
    assert [token["text"] for token in prompted] == ["query", ":", "a", "naïve", "cat"]
    (cut,) = ok(ask.post("/tokenize", json={"inputs": LONG, "truncate": True}))
    assert len(cut) == 256
    ids = [token["id"] for token in tokens]
    wanted = client.embed(["a naïve cat"])
    for given in (ids, [ids]):
        close(ok(ask.post("/embed", json={"inputs": given})), wanted)
        met = openai(ask, input=given)
        close([one["embedding"] for one in met], wanted)
        assert met[0]["tokens"] == 5
