# SPDX-License-Identifier: Apache-2.0
"""The load of `perf.profile`: closed loops over gRPC in one asyncio loop, requests made beforehand.

perf_analyzer is not used here: it cannot send two kinds of requests at once, nor draw texts by a
distribution, and says nothing of single requests.

    with served(repository) as server:
        at = server.address
        short, long = run(Stream(at, some, 1, 5.0), Stream(at, others, 1, 5.0))
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from arrowhead_server.address import Address
from perf.server import MODEL
from perf.stats import Sample

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_TIMEOUT_S = 120.0
# A channel of its own for each stream, not one shared under the surface.
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


class LoadFailed(Exception):
    """A request was not answered, or not with vectors."""


@dataclass(frozen=True)
class Stream:
    """Clients that send one request after the other, each its next as soon as it is answered.

    Attributes:
        address: of the server.
        requests: serialized; the stream ends when they run out.
        clients: requests in flight at once.
        seconds: nothing is sent after that.
    """

    address: Address
    requests: Iterable[bytes]
    clients: int
    seconds: float


@dataclass(frozen=True)
class Sent:
    """What came of a stream.

    Attributes:
        ms: latency of every request, as its caller saw it, in the order of the answers.
        seconds: from the first request to the last answer.
    """

    ms: list[float]
    seconds: float

    @property
    def requests_s(self) -> float:
        """Requests answered in a second."""
        return len(self.ms) / self.seconds

    @property
    def mean_ms(self) -> float:
        """The mean latency, which sums of Triton's own statistics can be compared with."""
        return float(np.mean(self.ms))

    def percentile_ms(self, percent: float) -> float:
        """The latency that so many percent of the requests did not exceed."""
        return float(np.percentile(self.ms, percent))


@dataclass(frozen=True)
class Latency:
    """Latencies and rate over several passes of one load."""

    p50_ms: Sample
    p99_ms: Sample
    most_ms: float
    requests_s: Sample
    requests: int

    @classmethod
    def of(cls, passes: Sequence[Sent]) -> Latency:
        """Of at least one pass, each with an answer."""
        return cls(
            Sample.of([sent.percentile_ms(50) for sent in passes]),
            Sample.of([sent.percentile_ms(99) for sent in passes]),
            max(max(sent.ms) for sent in passes),
            Sample.of([sent.requests_s for sent in passes]),
            sum(len(sent.ms) for sent in passes),
        )


def infer_request(texts: Sequence[str], model: str = MODEL) -> bytes:
    """A request for the embeddings of some texts, as it goes over the wire."""
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="text", datatype="BYTES", shape=[len(texts), 1])
    raw = b""
    for text in texts:
        data = text.encode()
        raw += len(data).to_bytes(4, "little") + data
    request.raw_input_contents.append(raw)
    return bytes(request.SerializeToString())


def run(*streams: Stream) -> list[Sent]:
    """Runs all streams at the same time, in this thread.

    Raises:
        LoadFailed: a request failed; all streams end then.
    """

    async def together() -> list[Sent]:
        return await asyncio.gather(*map(_run, streams))

    # A collection in the middle of a run would be taken for a slow answer.
    gc.collect()
    gc.disable()
    try:
        return asyncio.run(together())
    except grpc.RpcError as error:
        raise LoadFailed(f"{error.code()}: {error.details()}") from error
    finally:
        gc.enable()


async def _run(stream: Stream) -> Sent:
    address = f"{stream.address.host}:{stream.address.grpc_port}"
    requests = iter(stream.requests)
    ms: list[float] = []
    async with grpc.aio.insecure_channel(address, options=_CHANNEL) as channel:
        await channel.channel_ready()
        # Without serializers: what goes in and comes out is bytes, so that little of the cores
        # that the server shares is spent here.
        call = channel.unary_unary(_INFER, None, None)
        began = time.perf_counter()
        end = began + stream.seconds

        async def client() -> None:
            answer = b""
            while (before := time.perf_counter()) < end:
                request = next(requests, None)
                if request is None:
                    break
                answer = await call(request, timeout=_TIMEOUT_S)
                ms.append((time.perf_counter() - before) * 1e3)
            _check(answer)

        await asyncio.gather(*(client() for _ in range(stream.clients)))
        seconds = time.perf_counter() - began
    if not ms:
        raise LoadFailed("nothing was answered in the time given")
    return Sent(ms, seconds)


def _check(answer: bytes) -> None:
    """Looks at one answer of each client: finite vectors, and not an error in disguise."""
    if not answer:
        return
    response = service_pb2.ModelInferResponse.FromString(answer)
    vectors = np.frombuffer(response.raw_output_contents[0], np.float32)
    if not vectors.size or not np.isfinite(vectors).all():
        raise LoadFailed(f"{response.model_name} answered without vectors")
