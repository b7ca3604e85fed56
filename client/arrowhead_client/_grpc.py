# SPDX-License-Identifier: Apache-2.0
"""gRPC, blocking and async. tritonclient's errors become ours in `_translated` only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import tritonclient.grpc as wire
import tritonclient.grpc.aio as async_wire

from arrowhead_client._errors import InvalidUrl, from_status, unexpected
from arrowhead_client._info import Config
from arrowhead_client._plan import Answer, Request
from arrowhead_client._transports import AsyncTransport, Transport, config_in, embedding_width
from arrowhead_client._url import Endpoint, parse_url

_CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # While a channel backs off it fails every request without trying. gRPC's own back-off grows to
    # 120 s, which would outlast our retries: a restarted server must be met again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcTransport(Transport):
    """Blocking gRPC over one channel, which all threads share.

    Args:
        url: `grpc://host[:port]`.
    """

    def __init__(self, url: str) -> None:
        self._server = _endpoint(url)
        self._client = wire.InferenceServerClient(self._server.address, channel_args=_CHANNEL_ARGS)

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        with _translated(self._server, timeout_s):
            return _answer(request, self._client.infer(**_call(request), client_timeout=timeout_s))

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        with _translated(self._server, timeout_s):
            return bool(
                self._client.is_server_ready(client_timeout=timeout_s)
                and self._client.is_model_ready(model, client_timeout=timeout_s)
            )

    def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        with _translated(self._server, timeout_s):
            metadata = self._client.get_model_metadata(model, client_timeout=timeout_s)
        return embedding_width(_shapes(metadata), str(self._server), model)

    def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        with _translated(self._server, timeout_s):
            answer = self._client.get_model_config(model, client_timeout=timeout_s)
        return _config(answer.config)

    def close(self) -> None:
        """See `Transport.close`."""
        self._client.close()


class AsyncGrpcTransport(AsyncTransport):
    """gRPC for asyncio. The channel is made at the first request, in the loop that sends it.

    Args:
        url: `grpc://host[:port]`.
    """

    def __init__(self, url: str) -> None:
        self._server = _endpoint(url)
        self._client: Any = None

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """See `Transport.infer`."""
        with _translated(self._server, timeout_s):
            answer = await self._connected().infer(**_call(request), client_timeout=timeout_s)
            return _answer(request, answer)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """See `Transport.is_ready`."""
        client = self._connected()
        with _translated(self._server, timeout_s):
            return bool(
                await client.is_server_ready(client_timeout=timeout_s)
                and await client.is_model_ready(model, client_timeout=timeout_s)
            )

    async def width(self, model: str, timeout_s: float) -> int:
        """See `Transport.width`."""
        with _translated(self._server, timeout_s):
            metadata = await self._connected().get_model_metadata(model, client_timeout=timeout_s)
        return embedding_width(_shapes(metadata), str(self._server), model)

    async def config(self, model: str, timeout_s: float) -> Config:
        """See `Transport.config`."""
        with _translated(self._server, timeout_s):
            answer = await self._connected().get_model_config(model, client_timeout=timeout_s)
        return _config(answer.config)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._client is not None:
            await self._client.close()

    def _connected(self) -> Any:
        if self._client is None:
            self._client = async_wire.InferenceServerClient(
                self._server.address, channel_args=_CHANNEL_ARGS
            )
        return self._client


def _endpoint(url: str) -> Endpoint:
    endpoint = parse_url(url)
    if endpoint.protocol != "grpc":
        raise InvalidUrl(f"invalid url {url!r} for gRPC: wanted grpc://host[:port]")
    return endpoint


def _call(request: Request) -> dict[str, Any]:
    inputs = [
        wire.InferInput(name, list(array.shape), kind).set_data_from_numpy(array)
        for name, kind, array in request.inputs()
    ]
    return {
        "model_name": request.model,
        "model_version": str(request.version or ""),
        "inputs": inputs,
        "outputs": [wire.InferRequestedOutput(name) for name in request.outputs],
    }


def _answer(request: Request, result: Any) -> Answer:
    arrays = {name: result.as_numpy(name) for name in request.outputs}
    return {name: array for name, array in arrays.items() if array is not None}


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
    except wire.InferenceServerException as error:
        raise from_status(
            error.status(), error.message() or "", server=str(server), timeout_s=timeout_s
        ) from error
    except (ValueError, grpc.RpcError) as error:  # tensors that do not fit their own description
        raise unexpected(str(server), error) from error
