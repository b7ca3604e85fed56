# SPDX-License-Identifier: Apache-2.0
"""Long texts, large requests, and what the response cache answers."""

from __future__ import annotations

import re
import time
import urllib.request

import numpy as np
import pytest

from arrowhead_client import Client
from arrowhead_server.supervisor import Server


def metric(server: Server, name: str, model: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:  # noqa: S310
        text = answer.read().decode()
    found = re.search(rf'^{name}{{model="{model}",version="1"}} (\S+)$', text, re.MULTILINE)
    assert found, f"{name} of {model} is not among the metrics"
    return float(found[1])


def test_a_full_request_of_100_texts(server: Server) -> None:
    texts = [f"text number {i} " * (i % 20 + 1) for i in range(100)]
    with Client(server.grpc_url, batch_size=100) as client:
        whole = client.embed(texts)
        alone = client.embed(texts[37])
    assert whole.shape == (100, 384)
    assert float(whole[37] @ alone) > 0.9999


def test_long_lists_keep_their_order(client: Client) -> None:
    texts = [f"number {i}" for i in range(333)]
    whole = client.embed(texts)
    for i in (0, 31, 32, 150, 332):
        assert float(whole[i] @ client.embed(texts[i])) > 0.9999


def test_the_tokenizer_tells_counts_and_truncation(client: Client) -> None:
    # "word" is one token; [CLS] and [SEP] are two more; the model takes 256.
    counts = client.count_tokens(["word", "word " * 254, "word " * 255, "word " * 5000])
    assert counts.length.tolist() == [3, 256, 256, 256]
    assert counts.truncated.tolist() == [False, False, True, True]


def test_a_truncated_text_is_its_beginning(client: Client) -> None:
    a, b = client.embed(["word " * 254, "word " * 254 + "and something else entirely"])
    assert float(a @ b) > 0.9999


@pytest.mark.parametrize("word", ["quick ", "x", "\u6c49"])
def test_ten_megabytes_do_not_hold_the_server(client: Client, word: str) -> None:
    text = word * (10_000_000 // len(word.encode()))
    started = time.perf_counter()
    vector = client.embed(text)
    seconds = time.perf_counter() - started
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)
    # Tokenizing all of it would take six seconds; most of what is left is moving 10 MB.
    assert seconds < 2


def test_the_cache_answers_what_was_asked_before(server: Server, client: Client) -> None:
    name = "nv_cache_num_hits_per_model"
    text = "a text that no other test embeds"
    first = client.embed(text)
    hits = metric(server, name, "minilm")
    encoded = metric(server, "nv_inference_count", "minilm_encoder")
    again = client.embed(text)
    assert metric(server, name, "minilm") == hits + 1
    assert metric(server, "nv_inference_count", "minilm_encoder") - encoded < 3  # probes only
    np.testing.assert_array_equal(first, again)


def test_an_error_is_not_cached_as_a_success(server: Server) -> None:
    from arrowhead_client import GrpcTransport, InvalidRequest, Request

    transport = GrpcTransport(server.grpc_url)
    try:
        for _ in range(3):
            with pytest.raises(InvalidRequest, match="not UTF-8"):
                transport.infer(Request("minilm", [b"cache \xff me"], ("embeddings",)), 10.0)
    finally:
        transport.close()


def test_ready_while_it_serves(server: Server, client: Client) -> None:
    assert client.ready()
    with Client(server.http_url, model="nonesuch") as other:
        assert not other.ready()
