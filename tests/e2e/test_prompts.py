# SPDX-License-Identifier: Apache-2.0
"""Prompts by name, from the configuration that the real Triton serves."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from arrowhead_client import AsyncClient, Client, InvalidInput
from arrowhead_server.supervisor import Server

PROMPTS = {"query": "query: ", 'quoted "ß"': "two\nlines: ", "nothing": ""}


@pytest.mark.parametrize("protocol", ["grpc_url", "http_url"])
def test_a_name_is_its_text(prompted: Server, protocol: str) -> None:
    url = getattr(prompted, protocol)
    with Client(url) as client:
        assert client.prompts() == PROMPTS
        wanted = client.embed(["query: a cat", "query: a dog"])
        np.testing.assert_allclose(
            client.embed(["a cat", "a dog"], prompt_name="query"), wanted, atol=1e-6
        )
        assert abs(client.embed(["a cat", "a dog"]) - wanted).max() > 0.01
        lengths = client.count_tokens("a cat", prompt_name="query").length
        assert lengths == client.count_tokens("query: a cat").length
        with pytest.raises(InvalidInput, match=r"knows .*'query'"):
            client.embed("a cat", prompt_name="passage")

    async def prompts() -> dict[str, str]:
        async with AsyncClient(url) as client:
            return await client.prompts()

    assert asyncio.run(prompts()) == PROMPTS


def test_a_model_without_any_has_none(prompted: Server) -> None:
    for url in (prompted.grpc_url, prompted.http_url):
        with Client(url, model="minilm_tokenizer") as client:
            assert client.prompts() == {}
