# SPDX-License-Identifier: Apache-2.0
"""Two small servers that really speak the wire, gRPC and HTTP, and fail on command.

Each speaks as much of the inference protocol as the client uses. Both answer from `FakeTransport`,
so a vector that came over a road equals the one that came over none.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype

from arrowhead_client import (
    AsyncClient,
    AsyncGrpcTransport,
    AsyncHttpTransport,
    Client,
    FakeTransport,
    GrpcTransport,
    HttpTransport,
    Request,
)

WIDTH = 8


@dataclass
class Script:
    """What a server does: by default it answers well.

    Attributes:
        faults: taken one a request: `(http, grpc)` statuses to answer with and perhaps a message,
            or None to answer well.
        sleep_s: how long each answer takes, unless the server is being stopped.
        ready: what the health checks say.
        output: the name given to the embeddings.
        parameters: what `config.pbtxt` of the model says in its `parameters`.
        seen: the requests so far.
        configs_read: how often the configuration was asked for.
        connections: how many were made, over HTTP.
    """

    faults: deque[Any] = field(default_factory=deque)
    sleep_s: float = 0.0
    ready: bool = True
    output: str = "embeddings"
    parameters: dict[str, str] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    configs_read: int = 0
    connections: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    fake: FakeTransport = field(default_factory=lambda: FakeTransport(WIDTH))

    def answer(self, model: str, texts: list[bytes], outputs: list[str]) -> dict[str, Any]:
        request = Request(model, tuple(texts), tuple(outputs))
        self.seen.append(request)
        fault = self.faults.popleft() if self.faults else None
        if fault is not None:
            raise Fault(*fault)
        if model not in ("minilm", "minilm_tokenizer"):
            raise Fault(404, grpc.StatusCode.NOT_FOUND)
        self.stopping.wait(self.sleep_s)
        answer = self.fake.infer(request, 1.0)
        return {(self.output if name == "embeddings" else name): answer[name] for name in outputs}

    def config(self, model: str) -> dict[str, str]:
        self.configs_read += 1
        fault = self.faults.popleft() if self.faults else None
        if fault is not None:
            raise Fault(*fault)
        if model != "minilm":
            raise Fault(404, grpc.StatusCode.NOT_FOUND)
        return self.parameters


class Fault(Exception):
    def __init__(self, http: int, rpc: grpc.StatusCode, message: str = "as scripted") -> None:
        self.http, self.rpc, self.message = http, rpc, message


class _Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, script: Script) -> None:
        self.script = script

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.script.ready)

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == "minilm")

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        response = service_pb2.ModelMetadataResponse(name=request.name)
        response.outputs.add(name=self.script.output, datatype="FP32", shape=[-1, WIDTH])
        return response

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            parameters = self.script.config(request.name)
        except Fault as fault:
            context.abort(fault.rpc, fault.message)
        response = service_pb2.ModelConfigResponse()
        for key, value in parameters.items():
            response.config.parameters[key].string_value = value
        return response

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        texts = list(deserialize_bytes_tensor(request.raw_input_contents[0]))
        assert [request.inputs[0].name, *request.inputs[0].shape] == ["text", len(texts), 1]
        try:
            answer = self.script.answer(
                request.model_name, texts, [output.name for output in request.outputs]
            )
        except Fault as fault:
            context.abort(fault.rpc, fault.message)
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, array in answer.items():
            response.outputs.add(
                name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape
            )
            response.raw_output_contents.append(array.tobytes())
        return response


class _Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, else each answer waits 40 ms for an ACK
    script: Script

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v2/health/ready":
            self.reply(200 if self.script.ready else 400)
        elif self.path.endswith("/ready"):
            self.reply(200 if self.path == "/v2/models/minilm/ready" else 400)
        elif self.path.endswith("/config"):
            try:
                parameters = self.script.config(self.path.split("/")[3])
            except Fault as fault:
                self.reply(fault.http, json.dumps({"error": fault.message}).encode())
                return
            told = {key: {"string_value": value} for key, value in parameters.items()}
            self.reply(200, json.dumps({"name": "minilm", "parameters": told}).encode())
        else:
            output = {"name": self.script.output, "datatype": "FP32", "shape": [-1, WIDTH]}
            self.reply(200, json.dumps({"name": "minilm", "outputs": [output]}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        cut = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        request = json.loads(body[:cut])
        tensor = request["inputs"][0]
        if "data" in tensor:
            texts = [text.encode() for text in tensor["data"]]
        else:
            texts = list(deserialize_bytes_tensor(body[cut:]))
        assert [tensor["name"], *tensor["shape"]] == ["text", len(texts), 1]
        try:
            answer = self.script.answer(
                self.path.split("/")[3], texts, [output["name"] for output in request["outputs"]]
            )
        except Fault as fault:
            self.reply(fault.http, json.dumps({"error": fault.message}).encode())
            return
        binary = request["outputs"][0]["parameters"]["binary_data"]
        outputs, tail = [], b""
        for name, array in answer.items():
            output: dict[str, Any] = {"name": name, "shape": array.shape}
            output["datatype"] = np_to_triton_dtype(array.dtype)
            if binary:
                output["parameters"] = {"binary_data_size": array.nbytes}
                tail += array.tobytes()
            else:
                output["data"] = array.ravel().tolist()
            outputs.append(output)
        head = json.dumps({"model_name": "minilm", "outputs": outputs}).encode()
        self.reply(200, head + tail, {"Inference-Header-Content-Length": len(head)} if tail else {})

    def reply(self, status: int, body: bytes = b"", headers: dict[str, Any] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client gave up


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, script: Script) -> None:
        super().__init__(("127.0.0.1", port), type("Handler", (_Http,), {"script": script}))
        self.script = script
        self.connections: list[socket.socket] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that left is no news
            super().handle_error(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        self.script.connections += 1
        super().process_request(request, client_address)


class Server:
    """A server of one protocol on a port of its own, which it keeps when started again."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.script = Script()
        self.port = 0
        self._stop: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        return f"{self.protocol}://127.0.0.1:{self.port}"

    def start(self) -> Server:
        self.script.stopping.clear()
        self._stop = self._start_grpc() if self.protocol == "grpc" else self._start_http()
        return self

    def stop(self) -> None:
        self.script.stopping.set()
        self._stop()
        self._stop = lambda: None

    def _start_grpc(self) -> Callable[[], object]:
        server = grpc.server(ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Grpc(self.script), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        return lambda: server.stop(grace=None).wait()

    def _start_http(self) -> Callable[[], object]:
        server = _HttpServer(self.port, self.script)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()
            for connection in server.connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # already closed

        return stop


@dataclass
class Road:
    """One way to a server: `call("embed", texts)` goes there and back, blocking or in a loop."""

    name: str
    server: Server

    def call(
        self, method: str, *args: Any, options: dict[str, Any] | None = None, **settings: Any
    ) -> Any:
        """Calls a method of a fresh client. `settings` are the client's, `options` the method's."""
        options = options or {}
        with_json = {"binary": False} if self.name.endswith("json") else {}
        url = self.server.url
        if self.name.startswith("async"):
            make: Any = AsyncGrpcTransport if "grpc" in self.name else AsyncHttpTransport
            call = _call_async(lambda: make(url, **with_json), method, args, options, settings)
            return asyncio.run(call)
        make = GrpcTransport if "grpc" in self.name else HttpTransport
        with Client(transport=make(url, **with_json), **settings) as client:
            return getattr(client, method)(*args, **options)


async def _call_async(
    make: Any, method: str, args: Any, options: dict[str, Any], settings: dict[str, Any]
) -> Any:
    async with AsyncClient(transport=make(), **settings) as client:
        return await getattr(client, method)(*args, **options)


ROADS = ["grpc", "http", "http json", "async grpc", "async http", "async http json"]


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest) -> Iterator[Road]:
    server = Server("grpc" if "grpc" in request.param else "http").start()
    yield Road(request.param, server)
    server.stop()


@pytest.fixture
def http_server() -> Iterator[Server]:
    server = Server("http").start()
    yield server
    server.stop()


@pytest.fixture
def grpc_server() -> Iterator[Server]:
    server = Server("grpc").start()
    yield server
    server.stop()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits for a condition that must come true; fails loudly when it does not."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "the condition never came true"
            time.sleep(0.005)

    return wait


@pytest.fixture
def expected() -> Callable[[list[str]], np.ndarray]:
    """The vectors the servers give for these texts."""
    return lambda texts: np.asarray(Client(transport=FakeTransport(WIDTH)).embed(texts))
