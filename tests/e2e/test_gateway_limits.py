# SPDX-License-Identifier: Apache-2.0
"""The limits of a running gateway, each met, and its answer in both dialects."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from arrowhead_server.address import free_address
from arrowhead_server.gateway.embedder import BULK, INTERACTIVE
from arrowhead_server.gateway.protocol import MOST_HEAD
from arrowhead_server.supervisor import Server

from .conftest import successes, wait_until
from .gateways import started, stopped

TEI, OPENAI = "/embed", "/v1/embeddings"
MB = 10**6
Running = tuple[subprocess.Popen[bytes], str]
Start = Callable[..., Running]


@pytest.fixture
def start(server: Server) -> Iterator[Start]:
    """Starts gateways, and stops them at the end."""
    running: list[subprocess.Popen[bytes]] = []

    def one(*options: str, **how: Any) -> Running:
        process, url = started(f"--url={server.grpc_url}", *options, **how)
        running.append(process)
        return process, url

    yield one
    for process in running:
        stopped(process)


@pytest.fixture(scope="module")
def gateway(server: Server) -> Iterator[Running]:
    process, url = started(f"--url={server.grpc_url}")
    yield process, url
    stopped(process)


@pytest.fixture(scope="module")
def url(gateway: Running) -> str:
    return gateway[1]


def both(url: str, inputs: Any, **extra: Any) -> tuple[httpx.Response, httpx.Response]:
    """The same request in both dialects."""
    body = {"inputs": inputs, "input": inputs, "model": "minilm", **extra}
    return (
        httpx.post(url + TEI, json=body, timeout=60),
        httpx.post(url + OPENAI, json=body, timeout=60),
    )


def told(answer: httpx.Response) -> str:
    """The message, from either dialect's body, which has the dialect's fields."""
    error = answer.json()["error"]
    if isinstance(error, dict):
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["message"])
    assert set(answer.json()) == {"error", "error_type"}
    return str(error)


def refusals(url: str, reason: str) -> float:
    name = f'arrowhead_gateway_refused_total{{reason="{reason}"}} '
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    ("inputs", "statuses", "message", "reason"),
    [
        (["a", "b" * 100_001], (413, 400), "text 1 has 100001 characters: wanted 100000", "text"),
        ("ü" * 100_001, (413, 400), "text 0 has 100001 characters", "text"),
        (["a"] * 2049, (413, 400), "2049 texts: wanted 2048 at most a request", "texts"),
        ([[101, 102]] * 2049, (413, 400), "2049 texts: wanted 2048 at most a request", "texts"),
        ([[101, *[7] * 255, 102]], (413, 400), "has 257 token ids: wanted 256 at most", "length"),
        (["a"] * 20_000, (413, 413), "MB of memory to answer; wanted 512 at most", "body"),
        ("x" * 17 * MB, (413, 413), "a body of more than 16 MB", "body"),
    ],
)
def test_more_than_a_request_may_hold(
    url: str, inputs: Any, statuses: tuple[int, int], message: str, reason: str
) -> None:
    before = refusals(url, reason)
    answers = both(url, inputs)
    assert tuple(answer.status_code for answer in answers) == statuses
    for answer in answers:
        assert message in told(answer)
    assert refusals(url, reason) == before + 2


def test_as_much_as_a_request_may_hold(url: str) -> None:
    long = "b" * 100_000
    assert httpx.post(url + TEI, json={"inputs": long, "truncate": True}).status_code == 200
    body = {"input": long, "model": "minilm", "truncate": "end"}
    assert httpx.post(url + OPENAI, json=body).status_code == 200
    (tei, other) = both(url, [[101, *[7] * 254, 102]])
    assert (tei.status_code, other.status_code) == (200, 200)
    for path in ("/tokenize", "/similarity"):
        inputs: Any = "b" * 100_001
        if path == "/similarity":
            inputs = {"source_sentence": "a", "sentences": [inputs]}
        answer = httpx.post(url + path, json={"inputs": inputs})
        assert (answer.status_code, "wanted 100000 at most" in told(answer)) == (413, True)


@pytest.mark.parametrize("depth", [17, 1000, 200_000])
def test_json_that_is_nested_too_deep(url: str, depth: int) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"inputs": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    for path, status in ((TEI, 422), (OPENAI, 400)):
        answer = httpx.post(url + path, content=body, headers=headers)
        assert answer.status_code == status
        assert "nested deeper than 16 levels" in told(answer)


def test_limits_are_as_they_are_set(start: Start) -> None:
    _, url = start("--max-texts=3", "--max-text-chars=10", "--max-body-mb=0.001")
    for inputs, message in (
        (["a"] * 4, "wanted 3 at most"),
        ("b" * 11, "wanted 10 at most"),
        ("c" * 1001, "a body of more than 0.001 MB"),
    ):
        for answer in both(url, inputs):
            assert message in told(answer)
    assert httpx.get(f"{url}/info").json()["max_client_batch_size"] == 3
    assert [answer.status_code for answer in both(url, ["a", "b", "c"])] == [200, 200]


def test_headers_without_an_end(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for head in (
        b"POST /embed HTTP/1.1\r\nX: ",
        # Trailers are headers that come after a body.
        b"POST /embed HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as line:
            line.sendall(head)
            sent = 0
            with suppress(ConnectionError):
                while sent < 100 * MOST_HEAD:
                    line.sendall(b"x" * 16_384)
                    sent += 16_384
                    time.sleep(0.001)
            # It hung up; what was on the way meanwhile is the system's.
            assert sent < 100 * MOST_HEAD
    assert [answer.status_code for answer in both(url, "a")] == [200, 200]


# Rates


def test_a_rate_is_told_and_kept(start: Start) -> None:
    _, url = start("--rate=4/minute")
    left = []
    for _ in range(2):
        for answer in both(url, "a"):
            assert answer.status_code == 200
            assert answer.headers["RateLimit-Limit"] == "4"
            assert 0 < int(answer.headers["RateLimit-Reset"]) <= 60
            left.append(int(answer.headers["RateLimit-Remaining"]))
    assert left == [3, 2, 1, 0]
    for answer in both(url, "a"):
        assert answer.status_code == 429
        assert "more than 4 per 1 minute: wait" in told(answer)
        assert answer.headers["RateLimit-Remaining"] == "0"
        assert 0 < int(answer.headers["Retry-After"]) <= 60
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    triton = httpx.post(f"{url}/v2/models/minilm/infer", json={})
    assert (triton.status_code, set(triton.json())) == (429, {"error"})
    for _ in range(6):  # those who look after it are not counted
        assert httpx.get(f"{url}/ready").status_code == 200
    assert refusals(url, "rate") == 3


def test_who_waits_as_told_is_let_in_again(start: Start) -> None:
    _, url = start("--rate=1/5 seconds")

    def ask() -> httpx.Response:
        return httpx.post(url + TEI, json={"inputs": "a"})

    refused = next(answer for answer in (ask() for _ in range(100)) if answer.status_code == 429)
    time.sleep(int(refused.headers["Retry-After"]))
    assert ask().status_code == 200


def test_each_caller_has_a_rate_of_their_own(start: Start, tmp_path: Path) -> None:
    from .test_gateway_access import bearer, made_key

    alice, bob = (made_key(name, tmp_path / "keys") for name in ("alice", "bob"))
    again = made_key("alice", tmp_path / "keys")
    _, url = start(f"--keys={tmp_path / 'keys'}", "--rate=2/hour")

    def status(key: str) -> int:
        return httpx.post(url + TEI, json={"inputs": "a"}, headers=bearer(key)).status_code

    assert [status(key) for key in (alice, again, alice, again)] == [200, 200, 429, 429]
    assert [status(bob), status(bob), status(bob)] == [200, 200, 429]
    # Guesses are counted where they come from, and take nothing from those who have a key.
    assert [status("ah_guess") for _ in range(3)] == [401, 401, 429]


def test_forwarded_addresses_are_believed_of_a_named_proxy_only(start: Start) -> None:
    def statuses(url: str) -> list[int]:
        return [
            httpx.post(
                url + TEI, json={"inputs": "a"}, headers={"X-Forwarded-For": address}
            ).status_code
            for address in addresses
        ]

    addresses = ("192.0.2.1", "192.0.2.2", "::ffff:192.0.2.2", "2001:db8::1", "2001:db8::2", "a:b")
    _, alone = start("--rate=1/hour")
    _, behind = start("--rate=1/hour", "--proxy=127.0.0.1")
    assert statuses(alone) == [200, 429, 429, 429, 429, 429]
    assert statuses(behind) == [200, 200, 429, 200, 429, 200]  # of IPv6 a network is one caller


PASSWORD = secrets.token_hex(16)


class Redis:
    """A Redis on loopback that can be stopped and started."""

    def __init__(self) -> None:
        self.port = free_address().http_port
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["redis-server", "-", "--save", ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None
        settings = f"bind 127.0.0.1\nport {self.port}\nrequirepass {PASSWORD}\nappendonly no\n"
        self.process.stdin.write(settings.encode())
        self.process.stdin.close()
        wait_until(self._answers, "Redis")

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as line:
            line.sendall(b"PING\r\n")
            return line.recv(10).startswith(b"-NOAUTH")
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def redis() -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        if "CI" in os.environ:
            pytest.fail("no redis-server: scripts/test-packages installs it")
        pytest.skip("no redis-server: scripts/test-packages installs it")
    redis = Redis()
    redis.start()
    yield redis
    redis.stop()


def test_several_gateways_count_together_and_alone_while_redis_is_away(
    start: Start, redis: Redis, tmp_path: Path
) -> None:
    logs = [tmp_path / "log 1", tmp_path / "log 2"]
    environment = {**os.environ, "ARROWHEAD_RATE_STORE": redis.url}
    gateways = []
    for log in logs:
        with log.open("wb") as stderr:
            gateways.append(start("--rate=4/hour", env=environment, stderr=stderr))
    one, two = (url for _, url in gateways)

    def ask(url: str) -> tuple[int, str]:
        answer = httpx.post(url + TEI, json={"inputs": "a"})
        return answer.status_code, answer.headers["RateLimit-Remaining"]

    assert [ask(one), ask(two), ask(one)] == [(200, "3"), (200, "2"), (200, "1")]
    assert [ask(two), ask(two), ask(one)] == [(200, "0"), (429, "0"), (429, "0")]

    redis.stop()  # a limit is never off: each counts for itself
    assert [ask(one) for _ in range(5)] == [
        *((200, str(left)) for left in (3, 2, 1, 0)),
        (429, "0"),
    ]
    assert ask(two) == (200, "3")
    for log in logs:
        assert "no answer from Redis at 127.0.0.1:" in log.read_text()

    redis.start()  # it comes back empty
    wait_until(lambda: "answers again" in logs[0].read_text() or not ask(one), "Redis")
    assert ask(two)[0] == 200
    wait_until(lambda: "answers again" in logs[1].read_text() or not ask(two), "Redis")
    seen = "".join(log.read_text() for log in logs)
    seen += "".join(Path(f"/proc/{process.pid}/cmdline").read_text() for process, _ in gateways)
    assert PASSWORD not in seen


# Load


def test_many_at_once_are_shed_before_triton_queues(
    start: Start, server: Server, measured: Callable[..., None]
) -> None:
    _, url = start("--in-flight=60")

    async def flood(ask: httpx.AsyncClient, number: int) -> httpx.Response:
        path, field = ((TEI, "inputs"), (OPENAI, "input"))[number % 2]
        texts = [f"flood {number} {one} " + "word " * 30 for one in range(1 + number % 5)]
        return await ask.post(path, json={field: texts, "model": "minilm"})

    async def all_of_it() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as ask:
            return await asyncio.gather(*(flood(ask, number) for number in range(240)))

    def spent_s() -> float:
        """By all requests to the encoder together, from their arrival to their answer."""
        (line,) = [
            line
            for line in httpx.get(server.metrics_url).text.splitlines()
            if line.startswith('nv_inference_request_duration_us{model="minilm_encoder"')
        ]
        return float(line.rpartition(" ")[2]) / 1e6

    before, began = spent_s(), time.perf_counter()
    answers = asyncio.run(all_of_it())
    at_triton = (spent_s() - before) / (time.perf_counter() - began)  # Little's law
    assert {answer.status_code for answer in answers} == {200, 429}
    shed = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) - len(shed) >= 60
    for answer in shed:
        assert answer.headers["Retry-After"] == "1"
        assert "60 requests are under way already" in told(answer)
    assert refusals(url, "busy") == len(shed)
    assert 0 < at_triton <= INTERACTIVE + BULK
    measured("requests at Triton, mean", at_triton, "")
    assert "arrowhead_gateway_in_flight 0.0" in httpx.get(f"{url}/metrics").text


def test_a_text_beside_a_list_of_two_thousand(start: Start, measured: Callable[..., None]) -> None:
    _, url = start()
    count = 2000
    numbers = iter(range(10**6))

    def new(words: int) -> str:
        return f"text {next(numbers)} " + "word " * words

    async def single(ask: httpx.AsyncClient) -> float:
        began = time.perf_counter()
        (await ask.post(TEI, json={"inputs": new(8)})).raise_for_status()
        return time.perf_counter() - began

    async def measure() -> tuple[float, list[float], list[float]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as ask:
            alone = [await single(ask) for _ in range(10)]
            began = time.perf_counter()
            texts = [new(20) for _ in range(count)]
            bulk = asyncio.create_task(ask.post(OPENAI, json={"input": texts, "model": "minilm"}))
            await asyncio.sleep(0.2)
            beside = []
            while not bulk.done():
                beside.append(await single(ask))
            assert (await bulk).status_code == 200
            return time.perf_counter() - began, alone, beside

    took, alone, beside = asyncio.run(measure())
    # 24 tokens a text: 42 of them fill a part of 1,024.
    part = took / (count / 42)
    measured("list of 2,000", took)
    measured("its part", 1000 * part, "ms")
    measured("text alone", 1000 * statistics.median(alone), "ms")
    measured("text beside", 1000 * statistics.median(beside), "ms")
    measured("at worst", 1000 * max(beside), "ms")
    # It waits for the part that is at Triton already, and for none of the others: of 48 parts, many
    # texts get between.
    assert len(beside) >= 10


def test_a_long_list_gets_on_beside_many_short_ones(start: Start) -> None:
    _, url = start()

    async def measure() -> tuple[int, int]:
        done = False
        answered = 0

        async def caller(ask: httpx.AsyncClient, name: int) -> None:
            nonlocal answered
            number = 0
            while not done:
                number += 1
                text = f"caller {name} asks {number} " + "word " * 20
                (await ask.post(TEI, json={"inputs": text})).raise_for_status()
                answered += 1

        async with httpx.AsyncClient(base_url=url, timeout=120) as ask:
            callers = [asyncio.create_task(caller(ask, name)) for name in range(30)]
            texts = [f"long list {number} " + "word " * 20 for number in range(500)]
            bulk = await ask.post(TEI, json={"inputs": texts})
            meanwhile, done = answered, True
            await asyncio.gather(*callers)
            return bulk.status_code, meanwhile

    status, meanwhile = asyncio.run(measure())
    assert status == 200
    assert meanwhile > 30


@pytest.mark.parametrize("wide", ["", "🙂"])  # which makes a text's spaces four times as wide
def test_memory_stays_where_it_is_told_to(
    start: Start, measured: Callable[..., None], wide: str
) -> None:
    """Many callers, each with as large a request as there may be."""
    process, url = start()
    texts = [f"{number}{wide}{' ' * 7000}" for number in range(2048)]
    wish = {"inputs": texts, "truncate": True}
    body = json.dumps(wish, ensure_ascii=False).encode()
    assert 14 * MB < len(body) < 16 * MB
    bomb = b'{"inputs": [' + b"[]," * 5_000_000 + b"[]]}"
    wrong = b'{"inputs": [' + b"0.5," * 3_900_000 + b"0.5]}"
    here = psutil.Process(process.pid)
    before, most = here.memory_info().rss, 0

    async def post(ask: httpx.AsyncClient, content: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await ask.post(TEI, content=content, headers=headers)

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, here.memory_info().rss - before)
            await asyncio.sleep(0.01)

    async def all_of_it() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as ask:
            looking = asyncio.create_task(look())
            bombs = await asyncio.gather(*(post(ask, bomb) for _ in range(4)))
            answers = await asyncio.gather(*(post(ask, body) for _ in range(16)))
            assert (await post(ask, wrong)).status_code == 422
            looking.cancel()
            return [*bombs, *answers]

    answers = asyncio.run(all_of_it())
    assert {answer.status_code for answer in answers[:4]} <= {413, 429}
    statuses = [answer.status_code for answer in answers[4:]]
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code != 200:
            assert "of memory" in told(answer)
    measured("memory at most", most / MB, "MB")
    measured("answered", statuses.count(200), "of 16")
    assert most < 512 * MB
    assert [answer.status_code for answer in both(url, "a small one")] == [200, 200]
    assert "arrowhead_gateway_memory_bytes 0.0" in httpx.get(f"{url}/metrics").text


def test_probes_do_the_work_of_one(url: str, server: Server) -> None:
    def computed() -> int:
        return successes(server.metrics_url, "minilm")

    async def probe() -> list[int]:
        async with httpx.AsyncClient(base_url=url) as ask:
            answers = await asyncio.gather(*(ask.get("/health") for _ in range(50)))
            return [answer.status_code for answer in answers]

    before = computed()
    assert asyncio.run(probe()) == [200] * 50
    assert 1 <= computed() - before <= 5


def test_labels_are_no_callers_choice(url: str) -> None:
    secret = secrets.token_hex(8)
    for path in (f"/{secret}", f"/embed/{secret}", f"/info?{secret}"):
        httpx.get(url + path)
    httpx.post(url + OPENAI, json={"input": "a", "model": secret})
    metrics = httpx.get(f"{url}/metrics").text
    assert secret not in metrics
    assert 'reason="model"' in metrics
