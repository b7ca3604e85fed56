# SPDX-License-Identifier: Apache-2.0
"""What kills Triton 2.51 ends at the gateway: JSON 100,000 deep, a body of 1,000,000 chunks.

Between the two stands a relay that keeps all that the gateway sends, so that the tests see what
reaches Triton, and not only that it survives.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from arrowhead_server.supervisor import Server
from perf.fuzz.lines import Listener

from .gateways import started, stopped

DEPTH, CHUNKS = 100_000, 1_000_000
# Of each dialect: where it is asked, a body around a text, and the status where that is none.
DIALECTS = {
    "/embed": (b'{"inputs": %b}', 422),
    "/": (b'{"inputs": %b}', 422),
    "/similarity": (b'{"inputs": {"source_sentence": "a", "sentences": [%b]}}', 422),
    "/tokenize": (b'{"inputs": %b}', 422),
    "/v1/embeddings": (b'{"model": "minilm", "input": %b}', 400),
    "/v2/models/minilm/infer": (
        b'{"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [%b]}]}',
        400,
    ),
}


class Relay(Listener):
    """Passes connections on to Triton's HTTP port, and keeps what was sent there."""

    def __init__(self, port: int) -> None:
        self.sent = bytearray()
        self._triton, self._lock = port, threading.Lock()
        super().__init__()

    def asked(self) -> int:
        """How often the model was, until now; its tokenizer is looked at now and then."""
        with self._lock:
            return len(re.findall(rb"POST /v2/models/minilm(?:_encoder)?/", self.sent))

    def met(self, line: socket.socket) -> None:
        there = socket.create_connection(("127.0.0.1", self._triton))
        for source, target, kept in ((line, there, True), (there, line, False)):
            threading.Thread(target=self._pass, args=(source, target, kept), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, kept: bool) -> None:
        with source, suppress(OSError):
            while data := source.recv(65_536):
                if kept:
                    with self._lock:
                        self.sent += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def relay(server: Server) -> Iterator[Relay]:
    relay = Relay(int(server.http_url.rpartition(":")[2]))
    yield relay
    relay.stop()


@pytest.fixture(scope="module")
def url(relay: Relay) -> Iterator[str]:
    process, url = started(f"--url=http://127.0.0.1:{relay.port}")
    assert httpx.post(f"{url}/embed", json={"inputs": "the first"}, timeout=30).status_code == 200
    yield url
    stopped(process)


@pytest.fixture(autouse=True)
def unmoved(server: Server, relay: Relay, url: str) -> Iterator[None]:
    """Around each test: the same Triton and the same model processes, and a text is embedded."""
    before = server.pid, server.stub_pids()
    yield
    answer = httpx.post(f"{url}/embed", json={"inputs": f"good {time.time_ns()}"}, timeout=30)
    assert answer.status_code == 200
    assert (server.pid, server.stub_pids()) == before


def post(url: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str]:
    """Sends it as it is; status and message of the answer."""
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        line.putrequest("POST", path)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            line.putheader(name, value)
        line.endheaders()
        with suppress(ConnectionError):  # an answer may come before all was read
            line.send(body)
        answer = line.getresponse()
        error = json.loads(answer.read())["error"]
        return answer.status, str(error["message"] if isinstance(error, dict) else error)
    finally:
        line.close()


def chunked(body: bytes, size: int) -> bytes:
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize(
    "deep",
    [
        b"[" * DEPTH + b"]" * DEPTH,
        b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
        b'[{"a":' * DEPTH + b"1" + b"}]" * DEPTH,
        b"[ \n" * DEPTH,  # never closed
    ],
    ids=["lists", "objects", "both", "open"],
)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_json_that_is_deep(url: str, relay: Relay, path: str, deep: bytes, framing: str) -> None:
    body, status = DIALECTS[path][0] % deep, DIALECTS[path][1]
    headers = {"Content-Length": str(len(body))}
    if framing == "chunks":
        headers, body = {"Transfer-Encoding": "chunked"}, chunked(body, 9_000)
    before = relay.asked()
    met, told = post(url, path, headers, body)
    # Of so many keys, memory is reckoned first.
    wanted = (413, "MB of memory") if b'"a":' in deep else (status, "nested deeper than 16 levels")
    assert met == wanted[0]
    assert wanted[1] in told
    assert relay.asked() == before
    assert b"[[[[" not in relay.sent
    assert b'{"a":{"a":' not in relay.sent


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/embed", "has 1000000 characters: wanted 100000 at most"),
        ("/v1/embeddings", "has 1000000 characters: wanted 100000 at most"),
        ("/v2/models/minilm/infer", "has 1000000 characters: wanted 100000 at most"),
        ("/nowhere", "Not Found"),
    ],
)
def test_a_body_of_a_million_chunks(url: str, relay: Relay, path: str, told: str) -> None:
    text = b'"' + b"a" * CHUNKS + b'"'
    body = chunked(DIALECTS.get(path, (b"%b",))[0] % text, 1)
    before, began = relay.asked(), time.monotonic()
    status, met = post(url, path, {"Transfer-Encoding": "chunked"}, body)
    assert status in (400, 404, 413)
    assert told in met
    assert time.monotonic() - began < 30
    assert relay.asked() == before
    assert b"aaaaaaaaaaaaaaaa" not in relay.sent


def test_chunks_never_reach_triton(url: str, relay: Relay) -> None:
    """A good text around which a million blanks come one by one is one small request there."""
    body = b'{"inputs": "among blanks"' + b" " * CHUNKS + b"}"
    before, asked = len(relay.sent), relay.asked()
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    line.putrequest("POST", "/embed")
    line.putheader("Content-Type", "application/json")
    line.putheader("Transfer-Encoding", "chunked")
    line.endheaders()
    line.send(chunked(body, 1))
    answer = line.getresponse()
    assert answer.status == 200
    line.close()
    assert relay.asked() == asked + 1
    assert len(relay.sent) - before < 10_000
    assert b"chunked" not in relay.sent[before:].lower()


def test_others_are_answered_while_a_million_chunks_come(url: str) -> None:
    body = chunked(b'{"inputs": "' + b"a" * CHUNKS + b'"}', 1)
    sending = threading.Thread(
        target=post, args=(url, "/embed", {"Transfer-Encoding": "chunked"}, body)
    )
    sending.start()
    worst = 0.0
    while sending.is_alive():
        began = time.monotonic()
        answer = httpx.post(f"{url}/embed", json={"inputs": f"beside {time.time_ns()}"}, timeout=30)
        worst = max(worst, time.monotonic() - began)
        assert answer.status_code == 200
    sending.join()
    assert worst < 5
