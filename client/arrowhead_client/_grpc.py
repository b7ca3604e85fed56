# SPDX-License-Identifier: Apache-2.0
"""gRPC, blocking and async. gRPC's errors become ours in `_translated` only.

Messages and stub are tritonclient's. Its clients, which build the messages from numpy arrays, are
not used: texts are packed already, and packing them from an array of objects takes four times as
long as all the rest of a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from arrowhead_client._errors import InvalidUrl, from_status, unexpected
from arrowhead_client._info import Config
from arrowhead_client._plan import Answer, Request
from arrowhead_client._transports import AsyncTransport, Transport, config_in, embedding_width
from arrowhead_client._url import Endpoint, parse_url
from arrowhead_client._wire import MOST_BYTES, read

_CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MOST_BYTES),
    # While a channel backs off it fails every request without trying. gRPC's own back-off grows to
    # 120 s, which would outlast our retries: a restarted server must be met again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_SERVER_READY = messages.ServerReadyRequest()
_MODEL_READY = messages.ModelReadyRequest
_METADATA = messages.ModelMetadataRequest
_CONFIG = messages.ModelConfigRequest


class GrpcTransport(Transport):
    """Blocking gRPC over one channel, which all threads share.

    Args:
        url: `grpc://host[:port]`.
    """

    def __init__(self, url: str) -> None:
        self._server = _endpoint(url)
        self._channel = grpc.insecure_channel(self._server.address, options=_CHANNEL_ARGS)
        self._stub = GRPCInferenceServiceStub(self._channel)

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        with _translated(self._server, timeout_s):
            answer = self._stub.ModelInfer(
                _message(request), timeout=timeout_s, metadata=request.headers
            )
            return _answer(request, answer)

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        with _translated(self._server, timeout_s):
            return bool(
                self._stub.ServerReady(_SERVER_READY, timeout=timeout_s).ready
                and self._stub.ModelReady(_MODEL_READY(name=model), timeout=timeout_s).ready
            )

    def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        with _translated(self._server, timeout_s):
            metadata = self._stub.ModelMetadata(_METADATA(name=model), timeout=timeout_s)
        return embedding_width(_shapes(metadata), str(self._server), model)

    def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        with _translated(self._server, timeout_s):
            answer = self._stub.ModelConfig(_CONFIG(name=model), timeout=timeout_s)
        return _config(answer.config)

    def close(self) -> None:
        """See `Transport.close`."""
        self._channel.close()


class AsyncGrpcTransport(AsyncTransport):
    """gRPC for asyncio. The channel is made at the first request, in the loop that sends it.

    Args:
        url: `grpc://host[:port]`.
    """

    def __init__(self, url: str) -> None:
        self._server = _endpoint(url)
        self._channel: grpc.aio.Channel | None = None
        self._made_stub: Any = None

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        with _translated(self._server, timeout_s):
            answer = await self._stub.ModelInfer(
                _message(request), timeout=timeout_s, metadata=request.headers
            )
            return _answer(request, answer)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        stub = self._stub
        with _translated(self._server, timeout_s):
            return bool(
                (await stub.ServerReady(_SERVER_READY, timeout=timeout_s)).ready
                and (await stub.ModelReady(_MODEL_READY(name=model), timeout=timeout_s)).ready
            )

    async def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        with _translated(self._server, timeout_s):
            metadata = await self._stub.ModelMetadata(_METADATA(name=model), timeout=timeout_s)
        return embedding_width(_shapes(metadata), str(self._server), model)

    async def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        with _translated(self._server, timeout_s):
            answer = await self._stub.ModelConfig(_CONFIG(name=model), timeout=timeout_s)
        return _config(answer.config)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._channel is not None:
            await self._channel.close()

    @property
    def _stub(self) -> Any:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._server.address, options=_CHANNEL_ARGS)
            self._made_stub = GRPCInferenceServiceStub(self._channel)
        return self._made_stub


def _endpoint(url: str) -> Endpoint:
    endpoint = parse_url(url)
    if endpoint.protocol != "grpc":
        raise InvalidUrl(f"invalid url {url!r} for gRPC: wanted grpc://host[:port]")
    return endpoint


def _message(request: Request) -> Any:
    kinds = messages.ModelInferRequest
    inputs = request.inputs()
    return kinds(
        model_name=request.model,
        model_version=str(request.version or ""),
        id=request.id,
        inputs=[
            kinds.InferInputTensor(name=one.name, datatype=one.kind, shape=one.shape)
            for one in inputs
        ],
        outputs=[kinds.InferRequestedOutputTensor(name=name) for name in request.outputs],
        raw_input_contents=[one.content for one in inputs],
    )


def _answer(request: Request, answer: Any) -> Answer:
    contents = answer.raw_output_contents  # each is copied out of the message when it is taken
    if len(contents) != len(answer.outputs):
        raise ValueError(f"{len(answer.outputs)} outputs with {len(contents)} contents")
    if len({output.name for output in answer.outputs}) < len(answer.outputs):
        raise ValueError("an output twice")
    return {
        output.name: read(output.datatype, output.shape, contents[place])
        for place, output in enumerate(answer.outputs)
        if output.name in request.outputs
    }


def _shapes(metadata: Any) -> dict[str, Any]:
    return {output.name: list(output.shape) for output in metadata.outputs}


def _config(config: Any) -> Config:
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    steps = [(step.model_name, step.model_version) for step in config.ensemble_scheduling.step]
    return config_in(parameters, steps)


@contextmanager
def _translated(server: Endpoint, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_status(
            str(error.code()), error.details() or "", server=str(server), timeout_s=timeout_s
        ) from error
    except ValueError as error:  # tensors that do not fit their own description
        raise unexpected(str(server), error) from error
