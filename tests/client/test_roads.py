# SPDX-License-Identifier: Apache-2.0
"""One table of cases over every road, against servers that really speak the wire."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest

from arrowhead_client import (
    ArrowheadError,
    AsyncClient,
    AsyncHttpTransport,
    Client,
    ClientClosed,
    GrpcTransport,
    HttpTransport,
    InvalidInput,
    InvalidRequest,
    InvalidUrl,
    ModelNotFound,
    ModelNotReady,
    Request,
    ServerError,
    TimedOut,
    Unavailable,
    UnexpectedResponse,
)

UNAVAILABLE = (503, grpc.StatusCode.UNAVAILABLE)
INVALID = (400, grpc.StatusCode.INVALID_ARGUMENT)
NOT_FOUND = (404, grpc.StatusCode.NOT_FOUND)
INTERNAL = (500, grpc.StatusCode.INTERNAL)
# Triton's own words, over both roads.
DEAD_MODEL = (*INTERNAL, "in ensemble 'minilm', Stub process 'minilm_encoder_0_0' is not healthy.")
DEAD_IN_MUTEX = (*INTERNAL, "in ensemble 'minilm', Failed to obtain the health mutex.")
NOT_READY = (
    *UNAVAILABLE,
    "Request for unknown model: 'minilm_encoder' version 1 is not at ready state",
)
LATE = (504, grpc.StatusCode.DEADLINE_EXCEEDED)

TEXTS = [
    "a text",
    "",
    "grüße, 世界 \U0001f680",
    "nul \0 inside",
    "line\nbreak",
    '"quoted" \\',
    "e\u0301",
]


def test_every_road_gives_the_same_vectors(road: Any, expected: Any) -> None:
    vectors = road.call("embed", TEXTS)
    np.testing.assert_array_equal(vectors, expected(TEXTS))
    assert vectors.dtype == np.float32
    assert vectors.flags.writeable
    assert road.server.script.seen == [
        Request("minilm", tuple(text.encode() for text in TEXTS), ("embeddings",))
    ]


def test_many_requests_keep_their_order(road: Any, expected: Any) -> None:
    texts = [f"text {number}" for number in range(50)]
    vectors = road.call("embed", texts, batch_size=3, concurrency=4)
    np.testing.assert_array_equal(vectors, expected(texts))
    assert len(road.server.script.seen) == 17


def test_no_texts_take_their_width_from_the_model(road: Any) -> None:
    vectors = road.call("embed", [])
    assert vectors.shape == (0, 8)
    assert vectors.dtype == np.float32


def test_tokens_are_counted(road: Any) -> None:
    counts = road.call("count_tokens", ["one", "one two", "w " * 300], batch_size=2)
    assert counts.length.tolist() == [1, 2, 256]
    assert counts.truncated.tolist() == [False, False, True]
    assert (counts.length.dtype, counts.truncated.dtype) == (np.int32, np.bool_)
    assert road.server.script.seen[0].model == "minilm_tokenizer"


PARAMETERS = {"prompt.query": "query: ", "prompt.a.b": "", "prompt": "no", "other.prompt.x": "no"}


def test_prompts_are_read_from_the_models_configuration(road: Any, expected: Any) -> None:
    road.server.script.parameters = PARAMETERS
    assert road.call("prompts") == {"query": "query: ", "a.b": ""}
    vectors = road.call("embed", ["a", "b"], options={"prompt_name": "query"})
    np.testing.assert_array_equal(vectors, expected(["query: a", "query: b"]))
    road.call("count_tokens", ["a"], options={"prompt_name": "query"})
    assert road.server.script.seen[-1] == Request(
        "minilm_tokenizer", (b"query: a",), ("length", "truncated")
    )


def test_a_model_without_prompts_has_none(road: Any) -> None:
    assert road.call("prompts") == {}
    with pytest.raises(InvalidInput, match=r"prompt_name='query': model 'minilm' knows none\."):
        road.call("embed", ["a"], options={"prompt_name": "query"})
    assert road.server.script.seen == []


def test_reading_prompts_fails_and_is_retried_as_a_request(road: Any) -> None:
    road.server.script.parameters = PARAMETERS
    road.server.script.faults.append(UNAVAILABLE)
    assert road.call("prompts") == {"query": "query: ", "a.b": ""}
    assert road.server.script.configs_read == 2
    with pytest.raises(ModelNotFound):
        road.call("prompts", model="another")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (INVALID, InvalidRequest),
        (NOT_FOUND, ModelNotFound),
        (INTERNAL, ServerError),
        (LATE, TimedOut),
        (UNAVAILABLE, Unavailable),
        (DEAD_MODEL, Unavailable),
        (NOT_READY, ModelNotReady),
        ((*INVALID, NOT_READY[-1]), InvalidRequest),
        (DEAD_IN_MUTEX, Unavailable),
        ((*INVALID, DEAD_MODEL[-1]), InvalidRequest),  # a caller's own words, told back
    ],
)
def test_a_status_becomes_its_error(
    road: Any, fault: tuple[Any, ...], error: type[ServerError]
) -> None:
    road.server.script.faults.append(fault)
    with pytest.raises(ServerError) as caught:
        road.call("embed", ["a"], retries=0)
    assert type(caught.value) is error
    assert caught.value.status in (str(fault[0]), str(fault[1]))
    assert road.server.url in str(caught.value)
    assert len(road.server.script.seen) == 1


@pytest.mark.parametrize("fault", [INVALID, NOT_FOUND, INTERNAL, LATE])
def test_nothing_but_unavailable_is_retried(road: Any, fault: Any) -> None:
    road.server.script.faults.append(fault)
    with pytest.raises(ServerError):
        road.call("embed", ["a"])
    assert len(road.server.script.seen) == 1


@pytest.mark.parametrize("fault", [UNAVAILABLE, DEAD_MODEL, NOT_READY])
def test_unavailable_is_retried(road: Any, expected: Any, fault: Any) -> None:
    road.server.script.faults.extend([fault, fault])
    np.testing.assert_array_equal(road.call("embed", ["a"]), expected(["a"]))
    assert len(road.server.script.seen) == 3


@pytest.mark.parametrize(
    ("fault", "error"), [(UNAVAILABLE, Unavailable), (NOT_READY, ModelNotReady)]
)
def test_retries_end_and_say_how_many_there_were(
    road: Any, fault: Any, error: type[Unavailable]
) -> None:
    road.server.script.faults.extend([fault] * 5)
    with pytest.raises(error, match="Tried 3 times") as caught:
        road.call("embed", ["a"], retries=2)
    assert type(caught.value) is error
    assert len(road.server.script.seen) == 3


def test_a_server_that_comes_back_is_met_again(road: Any, expected: Any) -> None:
    road.server.stop()
    starter = threading.Timer(0.5, road.server.start)
    starter.start()
    try:
        np.testing.assert_array_equal(road.call("embed", ["a"]), expected(["a"]))
    finally:
        starter.join()


def test_a_restart_of_five_seconds_is_survived_by_default(grpc_server: Any, expected: Any) -> None:
    """The promise of `Client`, kept with no setting changed."""
    with Client(grpc_server.url) as client:
        client.embed(["a"])
        grpc_server.stop()
        starter = threading.Timer(5.3, grpc_server.start)
        starter.start()
        try:
            np.testing.assert_array_equal(client.embed(["b"]), expected(["b"]))
        finally:
            starter.join()


def test_a_dead_server_is_unavailable_and_not_ready(road: Any) -> None:
    road.server.stop()
    assert road.call("ready") is False
    with pytest.raises(Unavailable, match="arrowhead serve"):
        road.call("embed", ["a"], retries=0)


def test_ready_asks_the_server_and_the_model(road: Any) -> None:
    assert road.call("ready") is True
    assert road.call("ready", model="another") is False
    road.server.script.ready = False
    assert road.call("ready") is False


def test_a_slow_server_is_timed_out_and_not_asked_again(road: Any) -> None:
    road.server.script.sleep_s = 60
    with pytest.raises(TimedOut, match=r"within 0\.3 s"):
        road.call("embed", ["a"], timeout_s=0.3)
    assert len(road.server.script.seen) == 1


def test_the_first_failure_ends_the_call(road: Any) -> None:
    """The failure of one request is raised while its neighbours are still being answered."""
    road.server.script.sleep_s = 60
    road.server.script.faults.extend([None, INVALID])
    with pytest.raises(InvalidRequest):
        road.call("embed", [str(number) for number in range(100)], batch_size=1, concurrency=3)
    assert len(road.server.script.seen) <= 4


def test_a_foreign_output_name_is_told(road: Any) -> None:
    road.server.script.output = "vectors"
    with pytest.raises(UnexpectedResponse, match="arrowhead convert"):
        road.call("embed", ["a"])
    with pytest.raises(UnexpectedResponse, match="vectors"):
        road.call("embed", [])


@pytest.mark.parametrize("road", ["grpc", "http"], indirect=True)
def test_threads_share_a_client(road: Any, expected: Any) -> None:
    results: dict[int, Any] = {}
    with Client(road.server.url, batch_size=2) as client:

        def embed(number: int) -> None:
            results[number] = client.embed([f"{number} {text}" for text in TEXTS])

        threads = [threading.Thread(target=embed, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(4):
        np.testing.assert_array_equal(
            results[number], expected([f"{number} {text}" for text in TEXTS])
        )


@pytest.mark.parametrize("road", ["grpc", "http"], indirect=True)
def test_a_client_works_again_after_a_timeout(road: Any, expected: Any) -> None:
    """One connection only: a timeout must not keep it."""
    script = road.server.script
    with Client(road.server.url, concurrency=1, timeout_s=0.3) as client:
        script.sleep_s = 60
        with pytest.raises(TimedOut):
            client.embed(["a"])
        script.sleep_s = 0
        np.testing.assert_array_equal(client.embed(["a"]), expected(["a"]))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_a_cancelled_call_cancels_its_requests(
    protocol: str, request: pytest.FixtureRequest, expected: Any
) -> None:
    server = request.getfixturevalue(f"{protocol}_server")
    server.script.sleep_s = 60
    async with AsyncClient(server.url, batch_size=1, concurrency=2) as client:
        call = asyncio.create_task(client.embed(["a", "b", "c"]))
        while len(server.script.seen) < 2:
            await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(asyncio.all_tasks()) == 1
        server.script.sleep_s = 0
        np.testing.assert_array_equal(await client.embed(["a"]), expected(["a"]))


def _embed_one(url: str, **settings: Any) -> None:
    with Client(url, **settings) as client:
        client.embed(["a"])


def _embed_one_async(url: str, **settings: Any) -> None:
    async def embed() -> None:
        async with AsyncClient(url, **settings) as client:
            await client.embed(["a"])

    asyncio.run(embed())


@contextmanager
def _speaker(reply: bytes, *, drip: bool = False) -> Iterator[str]:
    """The url of a server that answers one connection with these bytes, whatever it is asked."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(reply)
                while drip and not done.wait(0.05):
                    connection.sendall(b" ")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # what is left unread would reset the connection
                    pass

        thread = threading.Thread(target=speak)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("embed_one", [_embed_one, _embed_one_async])
def test_http_to_something_else_is_told(embed_one: Callable[..., None]) -> None:
    """A port that answers, but not with HTTP, is an error at once: no retry, no waiting."""
    with (
        _speaker(b"this is no HTTP\r\n\r\n") as url,
        pytest.raises(UnexpectedResponse, match="Does this address belong to Triton"),
    ):
        embed_one(url)


def test_a_connection_closed_before_an_answer_is_retried(http_server: Any, expected: Any) -> None:
    """A kept connection that the server drops while the client is idle costs nobody anything."""
    with Client(http_server.url) as client:
        client.embed(["a"])
        http_server.stop()
        http_server.start()
        np.testing.assert_array_equal(client.embed(["b"]), expected(["b"]))


@pytest.mark.parametrize("road", ["grpc", "http"], indirect=True)
def test_closing_ends_a_call_of_another_thread(road: Any, until: Any) -> None:
    road.server.script.sleep_s = 60
    client = Client(road.server.url)
    errors: list[Exception] = []

    def embed() -> None:
        try:
            client.embed(["a"])
        except ArrowheadError as error:
            errors.append(error)

    thread = threading.Thread(target=embed)
    thread.start()
    until(lambda: len(road.server.script.seen) == 1)
    client.close()
    thread.join(20)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_connections_are_kept(http_server: Any) -> None:
    with Client(http_server.url) as client:
        for _ in range(5):
            client.embed(["a"])
    assert http_server.script.connections == 1


@pytest.mark.parametrize("embed_one", [_embed_one, _embed_one_async])
@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\n<b>no", Unavailable),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\n<b>no", ServerError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<b>no", UnexpectedResponse),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", UnexpectedResponse),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<b>no", Unavailable),
        (b"", Unavailable),
    ],
)
def test_what_a_proxy_may_say(
    embed_one: Callable[..., None], reply: bytes, error: type[ServerError]
) -> None:
    with _speaker(reply) as url, pytest.raises(ServerError) as caught:
        embed_one(url, retries=0)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("name", "told"),
    [
        *(("width", told) for told in ([], {}, None, 7, {"outputs": 1}, {"outputs": [{}]})),
        ("width", {"outputs": [{"name": "embeddings", "shape": "x"}]}),
        *(("config", told) for told in ([[]], None, 7, {"parameters": {"a": {}}})),
        ("config", {"ensemble_scheduling": {"step": [{}]}}),
    ],
)
def test_a_model_that_is_told_oddly(name: str, told: object) -> None:
    async def ask(url: str) -> None:
        transport = AsyncHttpTransport(url)
        try:
            await getattr(transport, name)("minilm", 5.0)
        finally:
            await transport.close()

    body = json.dumps(told).encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with _speaker(reply) as url, pytest.raises(UnexpectedResponse):
        getattr(HttpTransport(url), name)("minilm", 5.0)
    with _speaker(reply) as url, pytest.raises(UnexpectedResponse):
        asyncio.run(ask(url))


@pytest.mark.parametrize("embed_one", [_embed_one, _embed_one_async])
def test_the_timeout_is_of_the_whole_answer(embed_one: Callable[..., None]) -> None:
    """A body that drips never lets a single read time out."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"
    with _speaker(head, drip=True) as url, pytest.raises(TimedOut):
        embed_one(url, timeout_s=0.4)


def test_an_answer_cut_short_is_unavailable() -> None:
    with (
        _speaker(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{") as url,
        pytest.raises(Unavailable, match="IncompleteRead"),
    ):
        _embed_one(url, retries=0)


def test_a_redirect_is_not_followed(http_server: Any) -> None:
    head = f"HTTP/1.1 307 Away\r\nLocation: {http_server.url}/v2/models/minilm/infer\r\n"
    with (
        _speaker(f"{head}Content-Length: 0\r\n\r\n".encode()) as url,
        pytest.raises(ServerError, match="307"),
    ):
        _embed_one(url)
    assert http_server.script.connections == 0


def test_a_closed_transport_is_used_no_more(http_server: Any) -> None:
    transport = HttpTransport(http_server.url)
    transport.close()
    with pytest.raises(ClientClosed):
        transport.is_ready("minilm", 1.0)


def test_a_host_that_cannot_be_is_told() -> None:
    with pytest.raises(InvalidUrl, match="parse"):
        HttpTransport("http://\u2603.net")


def test_a_transport_refuses_the_other_protocol() -> None:
    with pytest.raises(InvalidUrl, match="wanted http://"):
        HttpTransport("grpc://127.0.0.1:8001")
    with pytest.raises(InvalidUrl, match="wanted grpc://"):
        GrpcTransport("http://127.0.0.1:8000")
