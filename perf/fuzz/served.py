# SPDX-License-Identifier: Apache-2.0
"""A real `arrowhead serve` and a real `arrowhead gateway`, given requests that are none.

After each the same processes live, and a good request gets the vector that it got before.
"""

from __future__ import annotations

import gzip
import http.client
import itertools
import json
import math
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import psutil
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from arrowhead_client import ArrowheadError, Client
from arrowhead_client._texts import packed
from perf.faults_clients import poison
from perf.fuzz.json_edits import edited
from perf.fuzz.target import Check, Target
from perf.peers.servers import free_port, started
from perf.server import MODEL, Served, served

_ANSWER_S = 20.0  # for an answer that must come
_NONE_S = 0.5  # for one that need not
_RESTART_S = 30.0
# Triton 2.51 dies of JSON that is 100,000 deep: known, and why a gateway stands in front of it.
_DEPTH_AT_TRITON = 500
_MOST_COUNTED = 2**60
_INSIDE = re.compile(r"Traceback|\.py\b|/1/model")  # what no stranger is told
_KNOWN = [f"a good request, number {number}" for number in range(16)]
_IDS = [101, 2204, 3793, 102]


class Watch:
    """Whether a server is the same as before, and answers as before."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._client = Client(f"grpc://127.0.0.1:{server.address.grpc_port}")
        self._vectors = self._client.embed(_KNOWN)
        self._of_ids = self._client.embed_ids([_IDS])
        self._count = itertools.count()
        self._pids = self._now()

    def check(self, *, may_die: bool = False) -> None:
        """Raises AssertionError if anything is not as it was; that is what it is from then on.

        Args:
            may_die: whether processes may be others, if they give the same vectors as before.
        """
        now = self._now()
        if now != self._pids:
            self._wait()
            died, self._pids = self._pids - now, self._now()
            if not may_die:
                raise AssertionError(f"{', '.join(sorted(name for name, _ in died))} died")
        # Of the encoder itself, past the response cache.
        met = self._client.embed_ids([_IDS])
        assert (met == self._of_ids).all(), "another vector than before"

    def check_gateway(self, url: str) -> None:
        """The same through a gateway."""
        number = next(self._count) % len(_KNOWN)
        answer = httpx.post(f"{url}/embed", json={"inputs": _KNOWN[number]}, timeout=_ANSWER_S)
        assert answer.status_code == 200, f"a good request got {answer.status_code}"
        met = np.array(answer.json(), np.float32)
        assert np.allclose(met, self._vectors[number], atol=1e-4), "another vector than before"

    def close(self) -> None:
        """Gives the connection back."""
        self._client.close()

    def _now(self) -> set[tuple[str, int]]:
        processes = psutil.Process(self._server.process.pid).children(recursive=True)
        found = set()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if (name := process.name()).startswith("triton"):
                    found.add((name, process.pid))
        return found

    def _wait(self) -> None:
        ends = time.monotonic() + _RESTART_S
        while time.monotonic() < ends:
            with suppress(ArrowheadError):
                self._client.embed_ids([_IDS])
                return


# Triton, over HTTP

_TEXTS = [b"a text", "é🙂".encode()]
_INPUT = {"name": "text", "shape": [2, 1], "datatype": "BYTES"}
_BINARY = {
    "inputs": [{**_INPUT, "parameters": {"binary_data_size": len(packed(_TEXTS))}}],
    "outputs": [{"name": "embeddings", "parameters": {"binary_data": True}}],
}
_LISTED = {"id": "1", "inputs": [{**_INPUT, "data": ["a text", "another"]}]}
_OF_IDS = {
    "inputs": [
        {"name": "input_ids", "shape": [1, 4], "datatype": "INT32", "data": _IDS},
        {"name": "length", "shape": [1, 1], "datatype": "INT32", "data": [4]},
    ]
}
_MODELS = st.sampled_from([MODEL, MODEL, f"{MODEL}_tokenizer", f"{MODEL}_encoder", "none", "%00"])
_VERSIONS = st.sampled_from(["", "", "", "/versions/1", "/versions/99", "/versions/x"])


class HttpRequest(NamedTuple):
    """A request to Triton."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@st.composite
def _http(draw: st.DrawFn) -> HttpRequest:
    model, version = draw(_MODELS), draw(_VERSIONS)
    base = draw(st.sampled_from([_BINARY, _BINARY, _LISTED, _OF_IDS]))
    head = draw(edited(base, _DEPTH_AT_TRITON))
    tail = packed(_TEXTS) if base is _BINARY else b""
    tail = tail[: draw(st.sampled_from([99, 99, 99, 3, 0]))] + draw(st.binary(max_size=8))
    headers = []
    size = draw(st.sampled_from([len(head)] * 6 + [0, -1, len(head) + 1, 2**31, 2**63, "x"]))
    if tail or draw(st.booleans()):
        headers.append(("Inference-Header-Content-Length", str(size)))
    body, coding = head + tail, draw(st.sampled_from([""] * 6 + ["gzip", "deflate", "br", "lie"]))
    if coding:
        body = gzip.compress(body) if coding == "gzip" else body
        headers.append(("Content-Encoding", "gzip" if coding == "lie" else coding))
    if draw(st.integers(0, 5)) == 0:
        headers.append(("Accept-Encoding", draw(st.sampled_from(["gzip", "deflate", "x", ""]))))
    verb = draw(st.sampled_from(["infer"] * 8 + ["generate", "stats"]))
    return HttpRequest(
        draw(st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE"])),
        f"/v2/models/{model}{version}/{verb}",
        tuple(headers),
        body,
    )


@contextmanager
def _triton_http(repository: Path) -> Iterator[Check]:
    with served(repository) as server:
        watch = Watch(server)

        def check(request: HttpRequest) -> None:
            line = http.client.HTTPConnection(
                "127.0.0.1", server.address.http_port, timeout=_ANSWER_S
            )
            try:
                line.request(request.method, request.path, request.body, dict(request.headers))
                answer = line.getresponse()
                told = answer.read()
                assert not _INSIDE.search(told.decode("latin-1")), f"{told!r:.300}"
            finally:
                line.close()
                watch.check()

        yield check
        watch.close()


# Triton, over gRPC

_SIZES = st.sampled_from([1, 1, 2, 4, 0, -1, 100, 101, 2**31, 2**62, -(2**63)])
_KINDS = st.sampled_from(["BYTES", "BYTES", "INT32", "INT32", "INT64", "FP32", "BOOL", "", "x"])
_NAMES = st.sampled_from(["text", "text", "input_ids", "length", "", "x"])
_CONTENT = st.one_of(
    st.just(packed([b"a text"])),
    st.just(packed(_TEXTS)),
    st.just(np.array(_IDS, "<i4").tobytes()),
    st.just(np.array([4], "<i4").tobytes()),
    st.just(b"\xff\xff\xff\xff"),
    st.just(b"\xff\xff\xff\x7fabc"),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6).map(
        lambda n: np.array(n, "<i4").tobytes()
    ),
    st.binary(max_size=40),
    st.binary(max_size=12).map(lambda raw: packed([raw])),
)


@st.composite
def _grpc(draw: st.DrawFn) -> bytes:
    request = messages.ModelInferRequest(
        model_name=draw(
            st.sampled_from([MODEL, f"{MODEL}_tokenizer", f"{MODEL}_encoder", "", "x"])
        ),
        model_version=draw(st.sampled_from(["", "", "", "1", "-1", "x"])),
        id=draw(st.sampled_from(["", "an id", "\x00"])),
    )
    if draw(st.booleans()):  # nearly right
        ids = draw(st.lists(st.integers(-2, 30_600), max_size=300))
        given = [("input_ids", "INT32", [1, len(ids)], np.array(ids, "<i4").tobytes())]
        length = np.array([draw(st.sampled_from([len(ids), len(ids), 0, 1, 9, 257]))], "<i4")
        given.append(("length", "INT32", [1, 1], length.tobytes()))
        if not request.model_name.endswith("encoder"):
            texts = draw(st.lists(st.binary(max_size=12), max_size=3))
            given = [("text", "BYTES", [len(texts), 1], packed(texts))]
        for name, kind, shape, content in given:
            request.inputs.add(name=name, datatype=kind, shape=shape)
            request.raw_input_contents.append(content)
    else:
        for _ in range(draw(st.integers(0, 3))):
            shape = draw(st.lists(_SIZES, max_size=4))
            tensor = request.inputs.add(name=draw(_NAMES), datatype=draw(_KINDS), shape=shape)
            if draw(st.integers(0, 3)) == 0:
                tensor.contents.int_contents.extend([1, 2])
                tensor.contents.bytes_contents.append(b"a text")
        for _ in range(draw(st.integers(0, 3))):
            request.raw_input_contents.append(draw(_CONTENT))
    wanted = [
        "embeddings",
        "length",
        "tokens",
        "offsets",
        "info",
        "input_ids",
        "truncated",
        "",
        "x",
    ]
    for name in draw(st.lists(st.sampled_from(wanted), max_size=4)):
        request.outputs.add(name=name)
    for name in draw(st.lists(st.sampled_from(_PARAMETERS), max_size=2)):
        request.parameters[name].int64_param = draw(st.sampled_from([0, 1, -1, 2**62]))
    return bytes(request.SerializeToString())


_PARAMETERS = (
    *("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"),
    *("classification", "shared_memory_region", "shared_memory_byte_size", "triton_x", ""),
)


@contextmanager
def _triton_grpc(repository: Path) -> Iterator[Check]:
    with served(repository) as server:
        watch = Watch(server)
        channel = grpc.insecure_channel(f"127.0.0.1:{server.address.grpc_port}")
        stub = GRPCInferenceServiceStub(channel)

        def check(raw: bytes) -> None:
            request = messages.ModelInferRequest.FromString(raw)
            try:
                stub.ModelInfer(request, timeout=_ANSWER_S)
            except grpc.RpcError as error:
                told = error.details() or ""
                assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, "no answer"
                assert not _INSIDE.search(told), f"{told!r:.300}"
            finally:
                watch.check(may_die=_overflows(request))

        yield check
        channel.close()
        watch.close()


def _overflows(request: messages.ModelInferRequest) -> bool:
    """Whether a tensor's bytes pass 64 bits: Triton 2.51 may lose a process to it (SECURITY.md)."""
    return any(math.prod(tensor.shape) >= _MOST_COUNTED for tensor in request.inputs)


# The gateway

_ROUTES: dict[str, Any] = {
    "/embed": {"inputs": ["a text", "é🙂"], "normalize": True, "truncate": False},
    "/": {"inputs": "a text", "dimensions": 8},
    "/v1/embeddings": {"input": ["a text", "b"], "model": MODEL, "encoding_format": "base64"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}},
    "/tokenize": {"inputs": ["a text"], "add_special_tokens": True},
    f"/v2/models/{MODEL}/infer": _LISTED,
    "/embed of ids": {"inputs": [[101, 2204, 102], [101, 3793, 102]]},
}
_TARGETS = st.sampled_from(
    ["", "", "", "", "", "?a=b", "/", "/../info", "%00", "#x", "//", "/\xff", "/" + "a" * 9000]
)
_METHODS = st.sampled_from(["POST"] * 8 + ["GET", "PUT", "OPTIONS", "HEAD", "CONNECT", "x", ""])
_HEADERS = st.lists(
    st.sampled_from(
        [
            *(b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16"),
            *(
                b"Authorization: Bearer x",
                b"Authorization: \xff",
                b"X-Forwarded-For: ::1, x",
                b"X: \x00",
            ),
            *(
                b"Expect: 100-continue",
                b"Upgrade: websocket",
                b"Connection: upgrade",
                b"Origin: http://x",
            ),
            *(b"Content-Encoding: gzip", b"Accept: image/png", b"Host: x", b"X: " + b"a" * 70_000),
            *(
                b"X: y\r\n" * 200 + b"X: y",
                b"traceparent: 00-x",
                b"X-Request-Id: \x1b[2J",
                b" folded",
            ),
            *(b"Transfer-Encoding: identity", b"Content-Length: 1", b"no colon", b"Cookie: a=b"),
        ]
    ),
    max_size=2,
)
_FRAMES = st.sampled_from(
    ["length"] * 8
    + ["chunked"] * 3
    + ["bytes", "too long", "too short", "both", "bad chunk", "none"]
)


class GatewayRequest(NamedTuple):
    """A request to the gateway, as bytes.

    Attributes:
        right: whether its framing is right and nothing was added, so that an answer must come.
    """

    route: str
    raw: bytes
    right: bool


@st.composite
def _gateway_requests(draw: st.DrawFn) -> GatewayRequest:
    route = draw(st.sampled_from(list(_ROUTES)))
    body = draw(edited(_ROUTES[route]))
    suffix, method, headers = draw(_TARGETS), draw(_METHODS), draw(_HEADERS)
    frame = draw(_FRAMES)
    head = b"%b %b HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" % (
        method.encode(),
        (route.partition(" ")[0] + suffix).encode("latin-1"),
    )
    if not any(header.startswith(b"Content-Type") for header in headers):
        head += b"Content-Type: application/json\r\n"
    head += b"".join(header + b"\r\n" for header in headers)
    if frame in ("chunked", "bytes", "both", "bad chunk"):
        head += b"Transfer-Encoding: chunked\r\n"
        size = 1 if frame == "bytes" else max(1, len(body) // 2)
        body = b"".join(
            b"%x\r\n%b\r\n" % (len(part), part)
            for part in (body[at : at + size] for at in range(0, len(body[:50_000]), size))
        )
        body += b"zz\r\nx\r\n0\r\n\r\n" if frame == "bad chunk" else b"0\r\n\r\n"
    if frame in ("length", "too long", "too short", "both"):
        off = {"too long": 7, "too short": -3}.get(frame, 0)
        head += b"Content-Length: %d\r\n" % max(len(body) + off, 0)
    right = frame in ("length", "chunked") and not headers and not suffix and method == "POST"
    return GatewayRequest(route, head + b"\r\n" + body, right)


@contextmanager
def gateway_before(server: Served) -> Iterator[str]:
    """The URL of a gateway in front of that server, as users start it; stopped at the end."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("arrowhead")), "gateway", f"--port={port}"]
    command += [f"--url=grpc://127.0.0.1:{server.address.grpc_port}"]
    with started(command, []) as gateway:
        url, ends = f"http://127.0.0.1:{port}", time.monotonic() + _RESTART_S
        while time.monotonic() < ends:
            assert gateway.is_alive(), gateway.said()
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
        yield url


@contextmanager
def _gateway(repository: Path) -> Iterator[Check]:
    with served(repository) as server, gateway_before(server) as url:
        watch, port = Watch(server), int(url.rpartition(":")[2])

        def check(request: GatewayRequest) -> None:
            try:
                _check_answer(request, _asked(port, request))
            finally:
                watch.check_gateway(url)
                watch.check()

        yield check
        watch.close()


def _asked(port: int, request: GatewayRequest) -> tuple[int, bytes] | None:
    """Status and body of the answer, if one came."""
    with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as line:
        with suppress(ConnectionError):  # it may hang up before all is sent
            line.sendall(request.raw)
        if not request.right:
            line.settimeout(_NONE_S)
        answer = http.client.HTTPResponse(line)
        try:
            answer.begin()
            return answer.status, answer.read()
        except (http.client.HTTPException, OSError):
            assert not request.right, "no answer"
            return None


def _check_answer(request: GatewayRequest, answer: tuple[int, bytes] | None) -> None:
    if answer is None:
        return
    status, body = answer
    assert status < 500, f"{status}: {body!r:.300}"
    assert not _INSIDE.search(body.decode("latin-1")), f"{status}: {body!r:.300}"
    if request.right and status != 200:
        assert "error" in json.loads(body), f"{status}: {body!r:.300}"
    if request.right and status == 200 and request.route.startswith(("/embed", "/ ")):
        sent = json.loads(request.raw.partition(b"\r\n\r\n")[2]) if _is_whole(request) else None
        vectors = json.loads(body)
        if sent is not None and isinstance(sent["inputs"], list) and request.route == "/embed":
            assert len(vectors) == len(sent["inputs"]), "not a vector for each text"
        assert all(math.isfinite(number) for vector in vectors for number in vector)


def _is_whole(request: GatewayRequest) -> bool:
    return b"Transfer-Encoding" not in request.raw.partition(b"\r\n\r\n")[0]


TRITON_HTTP = Target(
    "Triton: HTTP",
    "An answer that tells nothing of the inside; the same processes and vectors afterwards.",
    _http(),
    _triton_http,
    guided=False,
)
TRITON_GRPC = Target(
    "Triton: gRPC",
    f"{TRITON_HTTP.wanted} Of a shape whose bytes overflow a process may die, which is known: "
    f"within {_RESTART_S:.0f} s another gives the same vectors.",
    _grpc(),
    _triton_grpc,
    found=(poison().SerializeToString(),),
    guided=False,
)
GATEWAY = Target(
    "gateway: requests",
    "No status of 500 or above, the dialect's error or a vector for each text; Triton's processes "
    "and good requests' vectors the same afterwards.",
    _gateway_requests(),
    _gateway,
    guided=False,
)
