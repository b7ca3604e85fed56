# SPDX-License-Identifier: Apache-2.0
"""What the served model tells of itself, its tokens and its ids, by the real Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from arrowhead_client import (
    Client,
    HttpTransport,
    InvalidRequest,
    TextTooLong,
    cosine_similarity,
    dequantize,
    quantize,
)
from arrowhead_server.supervisor import Server

Vectors = npt.NDArray[np.float32]
LONG = " ".join(f"word{number}" for number in range(1000))


@pytest.fixture(params=["grpc", "http", "json"])
def road(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    if request.param == "json":
        made = Client(transport=HttpTransport(server.http_url, binary=False))
    else:
        made = Client(server.grpc_url if request.param == "grpc" else server.http_url)
    with made as client:
        yield client


def test_a_model_tells_what_it_is(road: Client, minilm_repository: Path) -> None:
    info = road.info()
    assert (info.name, info.version, info.dimension, info.max_seq_length) == ("minilm", 1, 384, 256)
    assert (info.pooling, info.normalize, info.prompts) == ("mean", True, {})
    file = minilm_repository / "minilm_encoder" / "1" / "metadata.json"
    certificate = json.loads(file.read_text())["arrowhead.certificate"]
    assert info.certificate["weights_sha256"] == certificate["weights_sha256"]
    assert "probes" not in info.certificate
    assert len(info.fingerprint) == 32


def test_int8_by_the_models_own_ranges_keeps_the_direction(
    road: Client, texts: list[str], wanted: Vectors
) -> None:
    ranges = road.info().ranges
    assert ranges is not None
    codes = road.embed(texts, precision="int8")
    # The table has what nobody calibrates for; among sentences the worst is above 0.999.
    cosines = np.diag(cosine_similarity(dequantize(codes, "int8", ranges), wanted))
    assert cosines.min() > 0.99
    assert cosines[0] > 0.9995
    whole = road.embed(texts)
    np.testing.assert_array_equal(codes, quantize(whole, "int8", ranges))
    np.testing.assert_array_equal(
        road.embed(texts, precision="ubinary"), np.packbits(whole > 0, axis=1)
    )


def test_tokens_are_the_tokenizers(road: Client, texts: list[str], minilm_repository: Path) -> None:
    tokenizer = Tokenizer.from_file(str(minilm_repository / "minilm_tokenizer/1/tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text, met in zip(texts, road.tokenize(texts), strict=True):
        whole = tokenizer.encode(text)
        assert met.truncated == (len(whole.ids) > 256)
        ids = [token.id for token in met.tokens]
        assert ids[:-1] == whole.ids[: len(ids) - 1]
        assert [token.text for token in met.tokens if token.special] == ["[CLS]", "[SEP]"]
        for token, span in zip(met.tokens[1:-1], whole.offsets[1:], strict=False):
            assert (token.start, token.stop) == span
            assert token.text == text[span[0] : span[1]]


def test_a_texts_ids_give_its_vector(road: Client, texts: list[str], wanted: Vectors) -> None:
    ids = [[token.id for token in one.tokens] for one in road.tokenize(texts)]
    np.testing.assert_allclose(road.embed_ids(ids), wanted, atol=1e-6)
    for wrong in ([10**6], [5] * 257):
        with pytest.raises(InvalidRequest):
            road.embed_ids([wrong])
    np.testing.assert_allclose(road.embed_ids(ids[:1]), wanted[:1], atol=1e-6)


def test_the_start_is_cut_up_to_a_word(road: Client) -> None:
    met = road.embed(LONG, truncate="start")
    ends = [" ".join(LONG.split()[first:]) for first in range(900, 960)]
    fits = ~road.count_tokens(ends).truncated
    longest = ends[int(fits.argmax())]
    np.testing.assert_allclose(met, road.embed(longest), atol=1e-6)
    with pytest.raises(TextTooLong, match="256 tokens"):
        road.embed(["a", LONG], truncate="none")
