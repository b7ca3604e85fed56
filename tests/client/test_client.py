# SPDX-License-Identifier: Apache-2.0
"""What the clients do around the wire: no network here, both clients over the fake transports."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arrowhead_client
from arrowhead_client import (
    ArrowheadError,
    AsyncClient,
    AsyncFakeTransport,
    Client,
    ClientClosed,
    FakeTransport,
    InvalidInput,
    InvalidRequest,
    InvalidUrl,
    Request,
    Unavailable,
    UnexpectedResponse,
    normalize,
    truncate_dimensions,
)
from arrowhead_client._errors import STATUSES, from_status
from arrowhead_client._plan import DEFAULT_RETRIES, Attempts, delays, encode_texts
from arrowhead_client._url import parse_url

Call = Callable[..., Any]


def _sync(fake: FakeTransport, method: str, *args: Any, **options: Any) -> Any:
    settings = options.pop("settings", {})
    with Client(transport=fake, **settings) as client:
        return getattr(client, method)(*args, **options)


def _async(fake: FakeTransport, method: str, *args: Any, **options: Any) -> Any:
    settings = options.pop("settings", {})

    async def call() -> Any:
        async with AsyncClient(transport=AsyncFakeTransport(fake), **settings) as client:
            return await getattr(client, method)(*args, **options)

    return asyncio.run(call())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    result: Call = request.param
    return result


def test_a_string_is_a_vector_and_a_list_is_a_matrix(call: Call) -> None:
    one, many = call(FakeTransport(), "embed", "a"), call(FakeTransport(), "embed", ["a", "b"])
    assert (one.shape, many.shape) == ((8,), (2, 8))
    np.testing.assert_array_equal(one, many[0])


def test_a_prompt_is_a_prefix(call: Call) -> None:
    fake = FakeTransport()
    call(fake, "embed", ["a", "b"], prompt="query: ")
    call(fake, "count_tokens", "a", prompt="query: ")
    assert [request.texts for request in fake.requests] == [
        (b"query: a", b"query: b"),
        (b"query: a",),
    ]


PROMPTS = {"query": "query: ", "passage": "passage: ", "none": ""}


@pytest.mark.parametrize("method", ["embed", "embed_arrow", "count_tokens"])
def test_a_prompt_is_known_by_its_name(call: Call, method: str) -> None:
    fake = FakeTransport(prompts=PROMPTS)
    call(fake, method, ["a"], prompt_name="passage")
    call(fake, method, ["a"], prompt_name="none")
    assert [request.texts for request in fake.requests] == [(b"passage: a",), (b"a",)]
    assert call(fake, "prompts") == PROMPTS


@pytest.mark.parametrize("method", ["embed", "embed_arrow", "count_tokens"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "a"}, r"prompt_name='a': model 'minilm' knows 'query', 'passage', 'none'"),
        ({"prompt_name": ""}, "prompt_name=''"),
        ({"prompt_name": 7}, "prompt_name is int"),
        ({"prompt_name": "query", "prompt": "q: "}, "give one of them"),
        ({"prompt_name": "query", "prompt": ""}, "give one of them"),
    ],
)
def test_a_prompt_that_cannot_be_meant(
    call: Call, method: str, options: dict[str, Any], message: str
) -> None:
    fake = FakeTransport(prompts=PROMPTS)
    with pytest.raises(InvalidInput, match=message):
        call(fake, method, ["a"], **options)
    assert fake.requests == []


async def test_prompts_are_read_once_and_only_when_wanted() -> None:
    fake = FakeTransport(prompts=PROMPTS)
    with Client(transport=fake) as client:
        client.embed("a", prompt="query: ")
        assert fake.configs_read == 0
        client.embed("a", prompt_name="query")
        client.prompts().clear()  # a caller's copy
        client.embed("a", prompt_name="passage")
        assert fake.configs_read == 1
    async with AsyncClient(transport=AsyncFakeTransport(fake)) as async_client:
        await async_client.embed("a", prompt="query: ")
        assert fake.configs_read == 1
        await async_client.embed("a", prompt_name="query")
        (await async_client.prompts()).clear()
        await async_client.embed("a", prompt_name="passage")
        assert fake.configs_read == 2


def test_dimensions_and_normalize_are_the_algebra(call: Call) -> None:
    fake = FakeTransport(answer=lambda request: {"embeddings": np.float32([[3, 0, 4, 12]])})
    whole = call(fake, "embed", ["a"])
    np.testing.assert_array_equal(whole, [[3, 0, 4, 12]])
    np.testing.assert_array_equal(
        call(fake, "embed", ["a"], dimensions=3), truncate_dimensions(whole, 3)
    )
    np.testing.assert_array_equal(call(fake, "embed", ["a"], normalize=True), normalize(whole))
    with pytest.raises(InvalidInput, match=r"wanted 1\.\.4"):
        call(fake, "embed", ["a"], dimensions=5)


def test_no_texts(call: Call) -> None:
    fake = FakeTransport()
    assert call(fake, "embed", []).shape == (0, 8)
    assert call(fake, "embed", [], dimensions=4).shape == (0, 4)
    assert call(fake, "embed_arrow", []).type == pa.list_(pa.float32(), 8)
    assert call(fake, "similarity", [], ["a"]).shape == (0, 1)
    assert call(fake, "count_tokens", []).length.shape == (0,)
    with pytest.raises(InvalidInput, match="dimensions=9"):
        call(fake, "embed", [], dimensions=9)


def test_arrow_shares_the_vectors_memory(call: Call) -> None:
    from arrowhead_client._arrow import to_arrow

    array = call(FakeTransport(), "embed_arrow", ["a", "b"])
    assert array.type == pa.list_(pa.float32(), 8)
    vectors = call(FakeTransport(), "embed", ["a", "b"])
    assert array.to_pylist() == vectors.tolist()
    assert to_arrow(vectors).values.buffers()[1].address == vectors.ctypes.data


def test_similarity(call: Call) -> None:
    cosines = call(FakeTransport(), "similarity", "a", ["a", "b", "c"])
    assert cosines.shape == (1, 3)
    assert cosines[0, 0] == pytest.approx(1)
    assert call(FakeTransport(), "similarity", ["a", "b"]).shape == (2, 2)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\] is NoneType"),
        ([b"a"], r"texts\[0\] is bytes"),
        (["a", 3.0], r"texts\[1\] is float"),
        (["a", "b\ud800"], r"texts\[1\] .* lone surrogate at index 1"),
        (b"ab", "texts is bytes"),
        (7, "texts is int"),
        ({"a": 1}, "texts is dict"),
    ],
)
def test_what_is_no_text_is_not_sent(call: Call, texts: object, message: str) -> None:
    fake = FakeTransport()
    with pytest.raises(InvalidInput, match=message):
        call(fake, "embed", texts)
    assert fake.requests == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), st.integers(1, 100))
def test_splitting_loses_and_reorders_nothing(texts: list[str], batch_size: int) -> None:
    fake = FakeTransport(4)
    vectors = _sync(fake, "embed", texts, settings={"batch_size": batch_size, "concurrency": 1})
    sent = [text for request in fake.requests for text in request.texts]
    assert sent == encode_texts(texts)
    assert all(1 <= len(request.texts) <= batch_size for request in fake.requests)
    assert len(fake.requests) == -(-len(texts) // batch_size)
    assert vectors.shape == (len(texts), 4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 8), r"\[1, 8\]"), ((2, 2, 2), r"\[2, 2, 2\]"), (None, "nothing")],
)
def test_an_answer_of_another_shape(call: Call, shape: Any, message: str) -> None:
    answer = {} if shape is None else {"embeddings": np.zeros(shape, np.float32)}
    with pytest.raises(UnexpectedResponse, match=message):
        call(FakeTransport(answer=lambda request: answer), "embed", ["a", "b"])


def test_an_answer_of_another_width(call: Call) -> None:
    def answer(request: Request) -> dict[str, Any]:
        return {"embeddings": np.zeros((1, 4 + (request.texts == (b"b",))), np.float32)}

    with pytest.raises(UnexpectedResponse, match="exchanged"):
        call(FakeTransport(answer=answer), "embed", ["a", "b"], settings={"batch_size": 1})


def test_threads_send_at_most_concurrency_at_once() -> None:
    barrier, lock, now, most = threading.Barrier(3), threading.Lock(), [0], [0]

    def answer(request: Request) -> dict[str, Any]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        barrier.wait(10)  # passes only when three are in flight
        with lock:
            now[0] -= 1
        return {"embeddings": np.zeros((1, 4), np.float32)}

    settings = {"batch_size": 1, "concurrency": 3}
    _sync(FakeTransport(answer=answer), "embed", list("abcdef"), settings=settings)
    assert most == [3]


def test_a_single_request_stays_in_the_callers_thread() -> None:
    threads = []

    def answer(request: Request) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return {"embeddings": np.zeros((1, 4), np.float32)}

    _sync(FakeTransport(answer=answer), "embed", "a")
    assert threads == [threading.current_thread()]


def test_a_pausing_retry_gives_up_when_its_neighbour_failed(until: Call) -> None:
    """Else the call's failure would be followed by requests nobody waits for."""

    def answer(request: Request) -> dict[str, Any]:
        if request.texts == (b"bad",):
            raise InvalidRequest("no")
        raise Unavailable("nobody")

    fake = FakeTransport(answer=answer)
    before = set(threading.enumerate())  # a server's own, in the same session
    with pytest.raises(InvalidRequest):
        _sync(fake, "embed", ["a", "bad"], settings={"batch_size": 1})
    until(lambda: not set(threading.enumerate()) - before)
    assert len(fake.requests) < DEFAULT_RETRIES


def test_the_progress_bar_counts_texts(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call(FakeTransport(), "embed", ["a"] * 20, progress=True, settings={"batch_size": 2})
    assert "20/20" in capsys.readouterr().err
    call(FakeTransport(), "embed", ["a"] * 20, settings={"batch_size": 1})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"batch_size": 101},
        {"batch_size": 2.0},
        {"concurrency": 0},
        {"concurrency": True},
        {"retries": -1},
        {"timeout_s": 0},
        {"model": ""},
    ],
)
def test_settings_out_of_range(call: Call, setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(setting))):
        call(FakeTransport(), "embed", "a", settings=setting)


async def test_use_after_close() -> None:
    client = Client(transport=(fake := FakeTransport()))
    client.close()
    client.close()
    assert fake.closed
    for method in (client.ready, lambda: client.embed("a"), client.__enter__):
        with pytest.raises(ClientClosed, match="make a new one"):
            method()
    async_client = AsyncClient(transport=AsyncFakeTransport())
    await async_client.close()
    with pytest.raises(ClientClosed):
        await async_client.embed("a")


def test_the_retry_schedule_outlasts_a_restart_of_five_seconds() -> None:
    waits = list(delays(DEFAULT_RETRIES))
    steps = [0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2]
    assert all(0.75 * step <= wait <= 1.25 * step for wait, step in zip(waits, steps, strict=True))
    assert 0.75 * sum(steps) > 6.5


def test_a_retry_that_would_end_too_late_is_not_made() -> None:
    error = Unavailable("nobody")
    with pytest.raises(Unavailable) as caught:
        Attempts(timeout_s=0.01, retries=5).delay_after(error)
    assert caught.value is error


def test_sync_and_async_are_twins() -> None:
    def public(kind: type) -> dict[str, list[Any]]:
        names = [name for name in vars(kind) if not name.startswith("_") and name != "model"]
        signatures = {name: inspect.signature(getattr(kind, name)) for name in names}
        return {name: list(found.parameters.values()) for name, found in signatures.items()}

    assert public(Client) == public(AsyncClient)
    assert all(isinstance(vars(kind)["model"], property) for kind in (Client, AsyncClient))
    assert all(inspect.iscoroutinefunction(getattr(AsyncClient, name)) for name in public(Client))
    made, async_made = inspect.signature(Client), inspect.signature(AsyncClient)
    assert list(made.parameters) == list(async_made.parameters)
    defaults = [parameter.default for parameter in made.parameters.values()]
    assert defaults == [parameter.default for parameter in async_made.parameters.values()]


def test_every_status_of_the_table_has_its_error() -> None:
    for error, pair in STATUSES.items():
        for status in pair:
            found = from_status(status, "said", server="grpc://host:1", timeout_s=2)
            assert type(found) is error
            assert found.status == status
            assert "grpc://host:1" in str(found)
    unknown = from_status("418", "a  teapot\n", server="http://host:1", timeout_s=2)
    assert str(unknown) == "http://host:1 failed (418): a teapot"


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("grpc://localhost", ("grpc", "localhost", 8001)),
        ("http://localhost/", ("http", "localhost", 8000)),
        ("http://10.0.0.1:99", ("http", "10.0.0.1", 99)),
        ("grpc://[::1]:5", ("grpc", "::1", 5)),
    ],
)
def test_urls(url: str, endpoint: tuple[str, str, int]) -> None:
    parsed = parse_url(url)
    assert (parsed.protocol, parsed.host, parsed.port) == endpoint
    assert parse_url(str(parsed)) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost", "localhost:8001", "ftp://host", "https://host", "grpcs://host", "grpc://",
        "http://host:0", "http://host:99999", "http://host:x", "http://host/path", "http://h?q=1",
        "http://user@host", "http://[::1", "http://a b", None, 8001,
    ],
)  # fmt: skip
def test_urls_that_are_none(url: Any) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(InvalidUrl, match="wanted grpc://host"):
            make(url)


def test_public_names_are_these() -> None:
    assert arrowhead_client.__all__ == [
        "ArrowheadError", "AsyncClient", "AsyncFakeTransport", "AsyncGrpcTransport",
        "AsyncHttpTransport", "AsyncTransport", "Client", "ClientClosed", "Config", "Document",
        "Experiment", "FakeTransport", "GrpcTransport", "Hit", "HttpTransport", "Index",
        "IndexBusy", "IndexDamaged", "IndexExists", "IndexFailed", "IndexNotFound", "InvalidInput",
        "InvalidRequest", "InvalidUrl", "ModelFiles", "ModelInfo", "ModelNotFound", "ModelNotReady",
        "NotInstalled", "Options", "OtherModel", "Request", "ServerError", "TextTooLong",
        "TimedOut", "Token", "TokenCounts", "Tokenized", "Transport", "Unavailable",
        "UnexpectedResponse", "cosine_similarity", "dequantize", "in_candidate", "normalize",
        "quantize", "truncate_dimensions",
    ]  # fmt: skip
    assert all(getattr(arrowhead_client, name) is not None for name in arrowhead_client.__all__)
    assert not hasattr(arrowhead_client, "nothing")


def test_all_errors_are_in_the_tree() -> None:
    errors = [getattr(arrowhead_client, name) for name in arrowhead_client.__all__]
    errors = [e for e in errors if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) == 19
    assert all(issubclass(error, ArrowheadError) and error.exit_code == 1 for error in errors)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import arrowhead_client", ["grpc", "aiohttp", "tritonclient", "gevent", "pyarrow"]),
        ("import arrowhead_client.cli", ["grpc", "aiohttp", "tritonclient", "pyarrow"]),
        ("import arrowhead_client as a; a.Client('grpc://h')", ["aiohttp", "gevent", "pyarrow"]),
        ("import arrowhead_client as a; a.Client('http://h')", ["grpc", "gevent", "pyarrow"]),
        ("import arrowhead_client as a; a.GrpcTransport, a.HttpTransport", []),
    ],
)
def test_imports_are_light(code: str, absent: list[str]) -> None:
    heavy = [*absent, "torch", "tokenizers", "transformers", "arrowhead_engine"]
    check = f"{code}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_model_that_does_not_tell_its_fingerprint_is_none_of_ours(call: Call) -> None:
    """By it indexes and memories tell models apart: one without any would pass for another."""
    told = json.loads(FakeTransport()._info())
    del told["fingerprint"]
    answer = {"info": np.array([[json.dumps(told).encode()]], np.object_)}
    with pytest.raises(UnexpectedResponse, match="fingerprint"):
        call(FakeTransport(answer=lambda request: answer), "info")
