# SPDX-License-Identifier: Apache-2.0
"""The gateway asked by the clients people have, each unchanged, against what `Client` gives.

    openai              OpenAI, AsyncOpenAI
    langchain-openai    OpenAIEmbeddings
    langchain-hugging…  HuggingFaceEndpointEmbeddings
    llama-index-embe…   TextEmbeddingsInference
    huggingface-hub     InferenceClient, AsyncInferenceClient
    litellm             its `openai/` and `triton/` providers

Each is asked synchronously and asynchronously, for one text and for several, with the options that
it has, and for what cannot be given, which must come as an exception of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio
import tiktoken
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

from arrowhead_client import Client, cosine_similarity, truncate_dimensions
from arrowhead_server.address import free_address
from arrowhead_server.supervisor import Server

from .gateways import started, stopped

MODEL = "minilm"
LONG = "a text whose end is cut off " * 100
QUESTION = "Who plays music?"
DOCUMENTS = [
    "A man is playing a guitar.",
    "naïve café,\nStraße",
    "快速的棕色狐狸 🙂",
    "word " * 100,
]
MANY = [f"document number {number}" for number in range(150)]  # more than any client sends at once


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    process, url = started(f"--url={server.grpc_url}")
    yield url
    stopped(process)


@pytest.fixture(autouse=True)
def hub_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is asked is the gateway, on loopback; offline, the hub's client refuses even that.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def close(met: Any, wanted: Any) -> None:
    met = np.asarray(met, np.float32)
    assert met.shape == wanted.shape
    np.testing.assert_allclose(met, wanted, atol=1e-6)


# openai. What it does synchronously is in test_gateway.py.


@pytest_asyncio.fixture
async def asynchronous(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_openai_async(asynchronous: openai.AsyncOpenAI, client: Client) -> None:
    made = await asynchronous.embeddings.create(model=MODEL, input=MANY, dimensions=64)
    close([one.embedding for one in made.data], truncate_dimensions(client.embed(MANY), 64))
    one = await asynchronous.embeddings.create(model=MODEL, input=QUESTION)
    close(one.data[0].embedding, client.embed(QUESTION))
    assert one.usage.prompt_tokens == client.count_tokens(QUESTION).length[0]
    assert (await asynchronous.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
        await asynchronous.embeddings.create(model="gpt", input=QUESTION)
    with pytest.raises(openai.BadRequestError, match="more than the 256 tokens"):
        await asynchronous.embeddings.create(model=MODEL, input=[QUESTION, LONG])


# LangChain, OpenAI.


@pytest_asyncio.fixture
async def langchain(url: str) -> AsyncIterator[Callable[..., OpenAIEmbeddings]]:
    # Connections of its own making it would leave open.
    with httpx.Client() as http_client:
        async with httpx.AsyncClient() as http_async_client:
            yield partial(
                OpenAIEmbeddings,
                base_url=f"{url}/v1",
                api_key="none",
                model=MODEL,
                http_client=http_client,
                http_async_client=http_async_client,
            )


async def test_langchain_openai_sends_texts_if_told_to(
    langchain: Callable[..., OpenAIEmbeddings], client: Client
) -> None:
    embeddings = langchain(check_embedding_ctx_length=False)
    close(embeddings.embed_documents(DOCUMENTS), client.embed(DOCUMENTS))
    close(embeddings.embed_query(QUESTION), client.embed(QUESTION))
    close(await embeddings.aembed_documents(DOCUMENTS), client.embed(DOCUMENTS))
    close(await embeddings.aembed_query(QUESTION), client.embed(QUESTION))
    short = langchain(check_embedding_ctx_length=False, dimensions=64, chunk_size=40)
    close(short.embed_documents(MANY), truncate_dimensions(client.embed(MANY), 64))
    cut = langchain(
        check_embedding_ctx_length=False, model_kwargs={"extra_body": {"truncate": "end"}}
    )
    close(cut.embed_query(LONG), client.embed(LONG))


async def test_langchain_openai_errors(langchain: Callable[..., OpenAIEmbeddings]) -> None:
    embeddings = langchain(check_embedding_ctx_length=False)
    with pytest.raises(openai.BadRequestError, match="text 1 has more than the 256 tokens"):
        embeddings.embed_documents([QUESTION, LONG])
    with pytest.raises(openai.BadRequestError, match="text 0 has more than the 256 tokens"):
        await embeddings.aembed_query(LONG)
    other = langchain(check_embedding_ctx_length=False, dimensions=1000)
    with pytest.raises(openai.BadRequestError, match=r"wanted 1\.\.384"):
        other.embed_query(QUESTION)


async def test_langchain_openai_by_itself_sends_ids_of_another_tokenizer_and_is_told(
    langchain: Callable[..., OpenAIEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    # OpenAI's own vocabularies are fetched from the network; this one has a token a byte.
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=".+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain().embed_query(QUESTION)


# huggingface_hub.


@pytest.mark.parametrize("path", ["", "/embed"])
def test_hub_feature_extraction(url: str, client: Client, path: str) -> None:
    hub = InferenceClient(url + path)
    close(hub.feature_extraction(QUESTION), client.embed([QUESTION]))
    close(hub.feature_extraction(DOCUMENTS, normalize=True), client.embed(DOCUMENTS))
    close(hub.feature_extraction(MANY), client.embed(MANY))
    short = hub.feature_extraction(DOCUMENTS, dimensions=64)
    close(short, truncate_dimensions(client.embed(DOCUMENTS), 64))
    for side, end in (("left", "start"), ("right", "end")):
        cut = hub.feature_extraction([LONG], truncate=True, truncation_direction=side)  # type: ignore[arg-type]
        close(cut, client.embed([LONG], truncate=end))  # type: ignore[arg-type]


async def test_hub_async(url: str, client: Client) -> None:
    async with AsyncInferenceClient(f"{url}/embed") as hub:
        close(await hub.feature_extraction(DOCUMENTS), client.embed(DOCUMENTS))
        with pytest.raises(HfHubHTTPError, match="more than the 256 tokens"):
            await hub.feature_extraction(LONG)
    async with AsyncInferenceClient(f"{url}/similarity") as hub:
        close(await hub.sentence_similarity(QUESTION, DOCUMENTS), similarities(client))


def test_hub_sentence_similarity(url: str, client: Client) -> None:
    hub = InferenceClient(f"{url}/similarity")
    close(hub.sentence_similarity(QUESTION, other_sentences=DOCUMENTS), similarities(client))


def similarities(client: Client) -> Any:
    return cosine_similarity(client.embed([QUESTION]), client.embed(DOCUMENTS))[0]


@pytest.mark.parametrize(
    ("text", "options", "status", "message"),
    [
        (LONG, {}, 413, "more than the 256 tokens"),
        (QUESTION, {"prompt_name": "q"}, 422, "model 'minilm' knows none"),
        (QUESTION, {"dimensions": 385}, 422, r"wanted 1\.\.384"),
        ([QUESTION] * 2049, {}, 413, "2048 at most"),
    ],
)
def test_hub_errors(
    url: str, text: Any, options: dict[str, Any], status: int, message: str
) -> None:
    with pytest.raises(HfHubHTTPError, match=message) as caught:
        InferenceClient(f"{url}/embed").feature_extraction(text, **options)
    assert caught.value.response.status_code == status


# LangChain, HuggingFace: its constructor takes no URL, but the clients that it asks may be set.


def test_langchain_huggingface_takes_no_url(url: str) -> None:
    with pytest.raises(ValueError, match="must be a HuggingFace repo ID, not a URL"):
        HuggingFaceEndpointEmbeddings(model=f"{url}/embed")


async def test_langchain_huggingface_with_its_clients_set(url: str, client: Client) -> None:
    embeddings = HuggingFaceEndpointEmbeddings(model=MODEL, model_kwargs={"truncate": True})
    embeddings.client = InferenceClient(f"{url}/embed")
    # It makes spaces of line breaks, which are the same to this model.
    close(embeddings.embed_documents(DOCUMENTS), client.embed(DOCUMENTS))
    close(embeddings.embed_query(LONG), client.embed(LONG))
    async with AsyncInferenceClient(f"{url}/embed") as embeddings.async_client:
        close(await embeddings.aembed_documents(DOCUMENTS), client.embed(DOCUMENTS))
        close(await embeddings.aembed_query(QUESTION), client.embed(QUESTION))
    embeddings.model_kwargs = {"prompt_name": "q"}
    with pytest.raises(HfHubHTTPError, match="model 'minilm' knows none"):
        embeddings.embed_query(QUESTION)


# LlamaIndex.


async def test_llama_index(url: str, client: Client) -> None:
    embedding = TextEmbeddingsInference(model_name=MODEL, base_url=url)
    close(embedding.get_query_embedding(QUESTION), client.embed(QUESTION))
    close(embedding.get_text_embedding(LONG), client.embed(LONG))  # it asks for the cut
    close(embedding.get_text_embedding_batch(MANY), client.embed(MANY))
    close(await embedding.aget_query_embedding(QUESTION), client.embed(QUESTION))
    close(await embedding.aget_text_embedding_batch(DOCUMENTS), client.embed(DOCUMENTS))
    prompted = TextEmbeddingsInference(
        model_name=MODEL, base_url=url, query_instruction="query:", embed_batch_size=100
    )
    close(prompted.get_query_embedding(QUESTION), client.embed(f"query: {QUESTION}"))


def test_llama_index_looks_at_no_status(url: str) -> None:
    embedding = TextEmbeddingsInference(model_name=MODEL, base_url=url, truncate_text=False)
    with pytest.raises(KeyError):  # of the answer's first vector, where there is an error's text
        embedding.get_text_embedding(LONG)


# LiteLLM. It is imported late: it takes seconds.


@pytest_asyncio.fixture
async def litellm() -> AsyncIterator[Any]:
    import litellm
    from litellm.llms.custom_httpx.http_handler import HTTPHandler

    yield litellm
    # Its connections are kept for later calls, in other event loops perhaps.
    cache = litellm.in_memory_llm_clients_cache
    await litellm.close_litellm_async_clients()
    for kept in cache.cache_dict.values():
        if isinstance(kept, (openai.OpenAI, HTTPHandler)):
            kept.close()
    cache.flush_cache()


def providers(url: str) -> list[dict[str, str]]:
    return [
        {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
        {"model": f"triton/{MODEL}", "api_base": f"{url}/v2/models/{MODEL}/infer"},
    ]


@pytest.mark.parametrize("provider", [0, 1], ids=["openai", "triton"])
async def test_litellm(litellm: Any, url: str, client: Client, provider: int) -> None:
    where = providers(url)[provider]
    for given, texts in ((QUESTION, [QUESTION]), (DOCUMENTS, DOCUMENTS), (MANY, MANY)):
        made = litellm.embedding(input=given, **where)
        close([one["embedding"] for one in made.data], client.embed(texts))
        assert [one["index"] for one in made.data] == list(range(len(texts)))
        made = await litellm.aembedding(input=given, **where)
        close([one["embedding"] for one in made.data], client.embed(texts))
    assert made.model == MODEL


def test_litellm_passes_dimensions_on_if_told_to(litellm: Any, url: str, client: Client) -> None:
    openai_like, _ = providers(url)
    made = litellm.embedding(
        input=DOCUMENTS, dimensions=64, allowed_openai_params=["dimensions"], **openai_like
    )
    wanted = truncate_dimensions(client.embed(DOCUMENTS), 64)
    close([one["embedding"] for one in made.data], wanted)


async def test_litellm_errors(litellm: Any, url: str) -> None:
    openai_like, triton = providers(url)
    with pytest.raises(litellm.NotFoundError, match="no model 'gpt' here"):
        litellm.embedding(input=QUESTION, **{**openai_like, "model": "openai/gpt"})
    with pytest.raises(litellm.NotFoundError, match="no model 'gpt' here"):
        await litellm.aembedding(
            input=[QUESTION], **{**triton, "api_base": f"{url}/v2/models/gpt/infer"}
        )
    with pytest.raises(litellm.BadRequestError, match="more than the 256 tokens"):
        litellm.embedding(input=[LONG], **openai_like)
    with pytest.raises(litellm.BadRequestError, match="2048 at most"):
        litellm.embedding(input=[QUESTION] * 2049, **triton)


# All of them, when Triton is not there.


def test_without_triton_each_says_so_in_its_own_way(litellm: Any) -> None:
    process, url = started(f"--url=grpc://127.0.0.1:{free_address().grpc_port}")
    openai_like, triton = providers(url)
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
            with pytest.raises(openai.InternalServerError, match=r"Unavailable|connect") as caught:
                official.embeddings.create(model=MODEL, input=QUESTION)
            assert caught.value.status_code == 503
        with pytest.raises(HfHubHTTPError, match="503"):
            InferenceClient(f"{url}/embed").feature_extraction(QUESTION)
        for where in (openai_like, triton):
            with pytest.raises(litellm.ServiceUnavailableError):
                litellm.embedding(input=[QUESTION], num_retries=0, max_retries=0, **where)
    finally:
        stopped(process)
