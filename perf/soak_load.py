# SPDX-License-Identifier: Apache-2.0
"""Callers of all kinds, good and bad, who know what each answer has to be.

The vectors of some hundred texts are computed beforehand by the engine in this process. A text
becomes one that nobody remembers by blanks at its end: they change its bytes, not its tokens.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import grpc.aio
import numpy as np
import orjson
from tritonclient.grpc import service_pb2, service_pb2_grpc

from arrowhead_client import ArrowheadError, AsyncClient
from arrowhead_server.gateway.asking import MOST_TEXTS
from deploy.stack import Stack
from perf.profile_server import zipf_ranks
from perf.quality import engine_vectors
from perf.server import MODEL
from perf.stats import Vectors
from perf.texts import Texts, blanks

LEAST_COSINE = 0.9999  # with the engine's own vector; of other texts it is below 0.95
LIST = 32
MOST_TEXTS_OF_TRITON = 100
REFUSED = "refused"  # the kind of all bad requests
_BAD, _HANG_UP = 0.04, 0.02  # shares of all operations
_NEW = 0.5  # of single short texts; the others come again
_MOST_APART = 0.01
_PATIENCE_S = 0.02
_SHORT, _LONG = 400, 60  # texts whose vectors are known
_AGAIN = 2000  # texts that come again, by Zipf's law
_MOST_UNDER_WAY = 64
_BEHIND_S = 2.0
_TIMEOUT_S = 30.0
_BUSY = (429, 502, 503, 504)  # asked again, as the clients do
_TRIES = 9
_RETRY_S = 0.5
_JSON = {"Content-Type": "application/json"}


class WrongVector(Exception):
    """An answer that is not the text's own vector."""


class Failed(Exception):
    """An answer that should have been another."""


_FAILURES = (
    ArrowheadError,
    Failed,
    WrongVector,
    aiohttp.ClientError,
    grpc.aio.AioRpcError,
    OSError,
    TimeoutError,
    asyncio.TimeoutError,  # before Python 3.11 another
)


@dataclass(frozen=True)
class Asked:
    """Texts with the vectors that are right for them, [N, D]."""

    texts: list[str]
    vectors: Vectors

    def check(self, found: Vectors) -> int:
        """How many vectors were compared.

        Raises:
            WrongVector: one of them is another, or there are too few.
        """
        if found.shape != self.vectors.shape:
            raise WrongVector(f"{found.shape} for {self.vectors.shape}")
        norms = np.linalg.norm(found, axis=1)  # the right ones have a length of 1
        cosines = (found * self.vectors).sum(axis=1) / np.maximum(norms, 1e-9)
        off = ~((cosines > LEAST_COSINE) & (abs(norms - 1) < 1e-2))  # NaN is off, too
        if off.any():
            place = int(np.flatnonzero(off)[0])
            raise WrongVector(
                f"cosine {cosines[place]:.6f}, length {norms[place]:.4f} for text {place} of "
                f"{len(off)}: {self.texts[place].strip()[:60]!r}"
            )
        return len(off)


class TextPool:
    """Texts whose vectors are known, short and long, new or asked for before."""

    def __init__(self, repository: Path, version: int) -> None:
        texts = Texts(seed=61)
        self._short = [texts.of_words(3, 20) for _ in range(_SHORT)]
        self._long = [texts.of_words(100, 400) for _ in range(_LONG)]  # some are cut
        self._vectors = engine_vectors(repository, version, self._short + self._long)
        self._rng = np.random.default_rng(62)
        self._ranks = zipf_ranks(_AGAIN, 1.0, 100_000, seed=63)
        self._given = _AGAIN
        self._drawn = 0

    def new(self, count: int = 1) -> Asked:
        """Short texts that nobody has asked for."""
        return self._marked(self._rng.integers(0, _SHORT, count), fresh=True)

    def long(self) -> Asked:
        """A long text that nobody has asked for."""
        return self._marked(self._rng.integers(_SHORT, _SHORT + _LONG, 1), fresh=True)

    def again(self, count: int = 1) -> Asked:
        """Short texts, some of which come much more often than others."""
        drawn = self._ranks[(self._drawn + np.arange(count)) % len(self._ranks)]
        self._drawn += count
        return self._marked(drawn % _SHORT, fresh=False, marks=drawn.tolist())

    def mixed(self, count: int = LIST) -> Asked:
        """Half new ones."""
        some, others = self.new(count // 2), self.again(count - count // 2)
        return Asked(some.texts + others.texts, np.concatenate([some.vectors, others.vectors]))

    def _marked(self, places: Any, *, fresh: bool, marks: Sequence[int] = ()) -> Asked:
        if fresh:
            marks = range(self._given, self._given + len(places))
            self._given += len(places)
        every = self._short + self._long
        texts = [every[place] + blanks(mark) for place, mark in zip(places, marks, strict=True)]
        return Asked(texts, self._vectors[places])


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        ms: by kind, when each was answered (time.monotonic()), and after how many milliseconds.
        answered: of each kind.
        failures: by kind and what was wrong.
        wrong: the first of the wrong vectors.
    """

    ms: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    vectors: int = 0
    wrong: list[str] = field(default_factory=list)
    hung_up: int = 0
    skipped_s: float = 0.0

    @property
    def failed(self) -> int:
        """Requests that failed, wrong vectors among them."""
        return sum(self.failures.values())

    def took(self, kind: str, due: float) -> None:
        """Notes an answer that came just now."""
        now = time.monotonic()
        self.ms.setdefault(kind, []).append((now, (now - due) * 1e3))


class Callers:
    """Asks a stack on every road, as an asynchronous context manager.

    Attributes:
        tally: what came of it.
    """

    def __init__(self, stack: Stack, known: TextPool) -> None:
        self._stack, self._known = stack, known
        self.tally = Tally()
        self._rng = np.random.default_rng(64)
        self._bad = self._bad_requests()
        # Shares of all operations.
        good: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "/v1/embeddings": (18, lambda: self._openai(self._new_or_known())),
            "/embed": (18, lambda: self._embed(self._new_or_known())),
            "/embed, long text": (4, lambda: self._embed(known.long())),
            "/v1/embeddings, list": (3, lambda: self._openai(known.mixed())),
            "/similarity": (5, self._similarity),
            "gRPC": (20, lambda: self._triton(self._grpc, self._new_or_known())),
            "gRPC, long text": (4, lambda: self._triton(self._grpc, known.long())),
            "gRPC, list": (3, lambda: self._triton(self._grpc, known.mixed())),
            "HTTP to Triton": (15, lambda: self._triton(self._http, self._new_or_known())),
        }
        self._good = {kind: call for kind, (_, call) in good.items()}
        self._shares = np.array([share for share, _ in good.values()], float)
        self._shares /= self._shares.sum()

    async def __aenter__(self) -> Callers:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        )
        self._grpc = AsyncClient(self._stack.grpc_url, model=MODEL)
        self._http = AsyncClient(self._stack.http_url, model=MODEL)
        address = urlsplit(self._stack.grpc_url).netloc
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()
        await self._grpc.close()
        await self._http.close()
        await self._channel.close()

    @property
    def kinds(self) -> list[str]:
        """Of good requests."""
        return list(self._good)

    async def fill(self, texts: int) -> None:
        """Fills every memory of texts: what grows until it is full is no leak."""
        for _ in range(0, texts, 1000):
            await self._openai(self._known.new(1000))
        for _ in range(0, texts, 100):
            await self._triton(self._grpc, self._known.new(100))

    async def at_most(self, seconds: float, callers: int = 16) -> float:
        """Good operations a second, asked without a pause."""
        ends, before = time.monotonic() + seconds, sum(self.tally.answered.values())

        async def ask() -> None:
            while time.monotonic() < ends:
                await self._one(self._kind(), time.monotonic())

        began = time.monotonic()
        await asyncio.gather(*(ask() for _ in range(callers)))
        done = sum(self.tally.answered.values()) - before
        return done / (time.monotonic() - began)

    async def offer(self, rate: float, stop: asyncio.Event) -> None:
        """So many operations a second, at random moments, until told to stop.

        Latencies count from the moment when a request was due, whatever held it up.
        """
        room = asyncio.Semaphore(_MOST_UNDER_WAY)
        due = time.monotonic()
        async with anyio.create_task_group() as group:
            while not stop.is_set():
                due += self._rng.exponential(1 / rate)
                await asyncio.sleep(max(due - time.monotonic(), 0))
                await room.acquire()
                if (behind := time.monotonic() - due) > _BEHIND_S:
                    self.tally.skipped_s += behind
                    due = time.monotonic()
                group.start_soon(self._any, due, room)

    async def _any(self, due: float, room: asyncio.Semaphore) -> None:
        drawn = self._rng.random()
        try:
            if drawn < _BAD:
                await self._refused(due)
            elif drawn < _BAD + _HANG_UP:
                await self._hang_up()
            else:
                await self._one(self._kind(), due)
        finally:
            room.release()

    def _kind(self) -> str:
        return self.kinds[int(self._rng.choice(len(self._shares), p=self._shares))]

    async def _one(self, kind: str, due: float) -> None:
        try:
            await self._good[kind]()
        except _FAILURES as error:
            self._failed(kind, error)
            return
        self.tally.answered[kind] += 1
        self.tally.took(kind, due)

    def _failed(self, kind: str, error: BaseException) -> None:
        if isinstance(error, WrongVector):
            self.tally.wrong.append(f"{kind}: {error}")
        self.tally.failures[kind, f"{type(error).__name__}: {error}"[:300]] += 1

    def _new_or_known(self) -> Asked:
        return self._known.new() if self._rng.random() < _NEW else self._known.again()

    def _checked(self, asked: Asked, found: Vectors) -> None:
        self.tally.vectors += asked.check(found)

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """The status and the answer; who is busy is asked again."""
        for number in range(_TRIES):
            if number:
                await asyncio.sleep(_RETRY_S)
            async with self._session.post(url, data=body, headers=headers) as answer:
                status, content = answer.status, await answer.read()
            if status not in _BUSY:
                break
        return status, content

    async def _gateway(self, path: str, order: dict[str, Any]) -> Any:
        url = self._stack.gateway_url + path
        status, answer = await self._post(url, orjson.dumps(order), _JSON)
        if status != 200:
            raise Failed(f"{status}: {answer[:200].decode(errors='replace')}")
        return orjson.loads(answer)

    async def _openai(self, asked: Asked) -> None:
        order = {"model": MODEL, "input": asked.texts, "encoding_format": "base64"}
        rows = (await self._gateway("/v1/embeddings", order))["data"]
        content = b"".join(base64.b64decode(row["embedding"]) for row in rows)
        self._checked(asked, np.frombuffer(content, np.float32).reshape(len(rows), -1))

    async def _embed(self, asked: Asked) -> None:
        rows = await self._gateway("/embed", {"inputs": asked.texts, "truncate": True})
        self._checked(asked, np.array(rows, np.float32))

    async def _similarity(self) -> None:
        asked = self._known.mixed(8)
        source, *sentences = asked.texts
        order = {"inputs": {"source_sentence": source, "sentences": sentences}}
        found = np.array(await self._gateway("/similarity", order), np.float32)
        wanted = asked.vectors[1:] @ asked.vectors[0]
        if found.shape != wanted.shape or not abs(found - wanted).max() < _MOST_APART:
            raise WrongVector(f"similarities {found}, wanted {wanted}")
        self.tally.vectors += len(asked.texts)

    async def _triton(self, client: AsyncClient, asked: Asked) -> None:
        self._checked(asked, await client.embed(asked.texts, progress=False))

    async def _refused(self, due: float) -> None:
        what, wanted, ask = self._bad[int(self._rng.integers(len(self._bad)))]
        try:
            status = await ask()
            if status != wanted:
                raise Failed(f"{status}, wanted {wanted}")
        except _FAILURES as error:
            self._failed(what, error)
            return
        self.tally.refused[what] += 1
        self.tally.took(REFUSED, due)

    def _bad_requests(self) -> list[tuple[str, object, Callable[[], Awaitable[object]]]]:
        """What is bad, how it must be answered, and a call that gives the answer's status."""
        stack = self._stack
        too_many = [b"a text"] * (MOST_TEXTS_OF_TRITON + 1)
        listed = orjson.dumps({"inputs": ["a text"] * (MOST_TEXTS + 1)})

        def gateway(path: str, body: bytes) -> Callable[[], Awaitable[object]]:
            return lambda: self._status(stack.gateway_url + path, body, _JSON)

        def http(texts: Sequence[bytes]) -> Callable[[], Awaitable[object]]:
            body, headers = _binary(texts)
            url = f"{stack.http_url}/v2/models/{MODEL}/infer"
            return lambda: self._status(url, body, headers)

        invalid = grpc.StatusCode.INVALID_ARGUMENT
        return [
            ("/embed, not JSON", 422, gateway("/embed", b'{"inputs": ')),
            ("/embed, not UTF-8", 422, gateway("/embed", b'{"inputs": "\xff"}')),
            ("/embed, too many texts", 413, gateway("/embed", listed)),
            ("/v1/embeddings, a number", 400, gateway("/v1/embeddings", b'{"input": 7}')),
            ("HTTP to Triton, not UTF-8", 400, http([b"good", b"\xff"])),
            ("HTTP to Triton, too many texts", 400, http(too_many)),
            ("gRPC, not UTF-8", invalid, lambda: self._code([b"good", b"\xff"])),
            ("gRPC, too many texts", invalid, lambda: self._code(too_many)),
        ]

    async def _status(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        return (await self._post(url, body, headers))[0]

    async def _code(self, texts: Sequence[bytes]) -> grpc.StatusCode:
        for number in range(_TRIES):
            if number:
                await asyncio.sleep(_RETRY_S)
            try:
                await self._stub.ModelInfer(_request(texts), timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                code: grpc.StatusCode = error.code()
                if code is not grpc.StatusCode.UNAVAILABLE:
                    return code
            else:
                return grpc.StatusCode.OK
        return grpc.StatusCode.UNAVAILABLE

    async def _hang_up(self) -> None:
        """Asks, and is gone before the answer; of HTTP sometimes before the question's end."""
        texts = self._known.mixed(8).texts
        patience = float(self._rng.random()) * _PATIENCE_S
        self.tally.hung_up += 1
        if self._rng.random() < 0.3:
            call = self._stub.ModelInfer(_request([text.encode() for text in texts]))
            await asyncio.sleep(patience)
            call.cancel()
            return
        body = orjson.dumps({"inputs": texts})
        url = urlsplit(self._stack.gateway_url)
        head = f"POST /embed HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        sent = whole if self._rng.random() < 0.5 else whole[: -len(body) // 2]
        with suppress(OSError):
            _, writer = await asyncio.open_connection(url.hostname, url.port)
            writer.write(sent)
            await asyncio.sleep(patience)
            writer.transport.abort()


def _request(texts: Sequence[bytes]) -> Any:
    return service_pb2.ModelInferRequest(
        model_name=MODEL,
        inputs=[
            service_pb2.ModelInferRequest.InferInputTensor(
                name="text", datatype="BYTES", shape=[len(texts), 1]
            )
        ],
        raw_input_contents=[_packed(texts)],
    )


def _binary(texts: Sequence[bytes]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request in Triton's binary form."""
    content = _packed(texts)
    told = {
        "name": "text",
        "shape": [len(texts), 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(content)},
    }
    head = orjson.dumps({"inputs": [told]})
    return head + content, {"Inference-Header-Content-Length": str(len(head))}


def _packed(texts: Sequence[bytes]) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
