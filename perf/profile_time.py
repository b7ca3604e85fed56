# SPDX-License-Identifier: Apache-2.0
"""Where the time of a request goes: seen by the caller, by Triton, and in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arrowhead_engine.encoder import Encoder
from arrowhead_engine.spec import Ids
from arrowhead_engine.tokenizer import Tokenizer
from perf.profile_load import Latency, Sent, Stream, infer_request, run
from perf.profile_stats import Counts, statistics
from perf.server import MODEL, Served
from perf.stats import Sample
from perf.texts import Texts, mixed, of_tokens

SHORT_TOKENS = 12
LOADED_CLIENTS = 32
NO_OP_CLIENTS = 16
TOKENIZER, ENCODER = f"{MODEL}_tokenizer", f"{MODEL}_encoder"


@dataclass(frozen=True)
class InProcess:
    """One batch in this process, nobody else on the cores; medians in microseconds.

    Attributes:
        texts: in the batch.
        encode: texts to ids. pad: ids to each request's arrays.
        check: that ids can be embedded. engine: ids to pooled vectors, one call of the kernels.
        rest: what else `Encoder.embed` does: equal texts, heads, normalizing.
    """

    texts: int
    encode: Sample
    pad: Sample
    check: Sample
    engine: Sample
    rest: Sample


@dataclass(frozen=True)
class Part:
    """A share of a request's time, in microseconds of the mean over all requests."""

    where: str
    name: str
    us: Sample


@dataclass(frozen=True)
class Seen:
    """One load on the running server.

    Attributes:
        title: of the load.
        latency: as the callers saw it. mean_us: the same, as a mean.
        passes: Triton's counters of each pass, by model.
        built_us: making one request out of its texts, before it is sent.
        batch: the mean number of texts that the encoder computed together.
    """

    title: str
    clients: int
    latency: Latency
    mean_us: list[float]
    passes: list[dict[str, Counts]]
    built_us: Sample

    @property
    def batch(self) -> float:
        """The mean number of texts that the encoder computed together."""
        counts = [one[ENCODER] for one in self.passes]
        return sum(c.texts for c in counts) / max(sum(c.executions for c in counts), 1)


@dataclass(frozen=True)
class Where:
    """One load, taken apart. The parts add up to what the caller sees."""

    seen: Seen
    inside: InProcess
    parts: list[Part]

    @property
    def total_us(self) -> float:
        """The sum of all parts."""
        return sum(part.us.median for part in self.parts)


@dataclass(frozen=True)
class Overhead:
    """One kind of request, from one caller and from several."""

    title: str
    alone: Latency
    several: Latency


@dataclass(frozen=True)
class TimeResults:
    """Where the time goes.

    Attributes:
        where: one text at a time; the same with an encoder that does nothing; a loaded server.
        overheads: the model, the encoder that does nothing, and a cached text.
        client: `Client.embed` of one new text at a time, in milliseconds.
    """

    where: list[Where]
    overheads: list[Overhead]
    client: Latency


def short(source: Texts) -> str:
    """A new text of 12 tokens."""
    return of_tokens(SHORT_TOKENS)(source)


def new_requests(
    source: Texts, seconds: float, *, mix: bool = False, most_a_second: int = 2500
) -> list[bytes]:
    """Requests of one new text each, enough for a load of so many seconds."""
    make = mixed if mix else short
    return [infer_request([make(source)]) for _ in range(int(seconds * most_a_second) + 100)]


def see(
    server: Served,
    source: Texts,
    title: str,
    *,
    clients: int,
    passes: int,
    seconds: float,
    mix: bool = False,
) -> Seen:
    """Runs one load of new texts several times, and reads Triton's statistics around each."""
    sent: list[Sent] = []
    counted: list[dict[str, Counts]] = []
    built: list[float] = []
    run(Stream(server.address, new_requests(source, 0.5, mix=mix), clients, 0.5))  # warms up
    for _ in range(passes):
        began = time.perf_counter()
        requests = new_requests(source, seconds, mix=mix)
        built.append((time.perf_counter() - began) / len(requests) * 1e6)
        before = statistics(server)
        sent += run(Stream(server.address, requests, clients, seconds))
        after = statistics(server)
        counted.append({name: count.since(before[name]) for name, count in after.items()})
    return Seen(
        title,
        clients,
        Latency.of(sent),
        [one.mean_ms * 1e3 for one in sent],
        counted,
        Sample.of(built),
    )


def overhead(
    server: Served, source: Texts, title: str, *, passes: int, seconds: float, cached: bool = False
) -> Overhead:
    """Latency with one caller, and rate with sixteen, of new texts or of a cached one."""

    def requests() -> Iterator[bytes] | list[bytes]:
        if cached:
            return itertools.repeat(infer_request([short(Texts(seed=7))]))
        return new_requests(source, seconds, most_a_second=8000)

    found: list[Latency] = []
    for clients in (1, NO_OP_CLIENTS):
        run(Stream(server.address, requests(), clients, min(seconds, 0.3)))
        streams = [Stream(server.address, requests(), clients, seconds) for _ in range(passes)]
        found.append(Latency.of([run(stream)[0] for stream in streams]))
    return Overhead(title, *found)


def through_client(server: Served, source: Texts, *, seconds: float) -> Latency:
    """`Client.embed` of one new text of 12 tokens after the other."""
    ms: list[float] = []
    with server.client() as client:
        client.embed(short(source))
        began = time.perf_counter()
        while (before := time.perf_counter()) < began + seconds:
            client.embed(short(source))
            ms.append((time.perf_counter() - before) * 1e3)
        return Latency.of([Sent(ms, time.perf_counter() - began)])


class Inside:
    """Tokenizer and encoder in this process, as the server has them."""

    def __init__(self, repository: Path) -> None:
        self.tokenizer = Tokenizer.open(repository / TOKENIZER / "1")
        self.encoder = Encoder.open(repository / ENCODER / "1" / "weights.parquet")

    def time(self, texts: Sequence[Sequence[str]]) -> InProcess:
        """Medians over some batches, each text of which is a request of its own."""
        taken: dict[str, list[float]] = {
            name: [] for name in ("encode", "pad", "check", "engine", "rest")
        }
        engine = self.encoder._engine
        inner: list[float] = []

        def timed(ids: Sequence[Ids], skips: Sequence[int] | None) -> Any:
            began = time.perf_counter()
            vectors = engine(ids, skips)
            inner.append(time.perf_counter() - began)
            return vectors

        self.encoder._engine = timed
        try:
            for batch in texts:
                marks = [time.perf_counter()]
                ids, truncated = self.tokenizer.encode(batch)
                marks.append(time.perf_counter())
                arrays = [
                    self.tokenizer.pad(ids[i : i + 1], truncated[i : i + 1])
                    for i in range(len(batch))
                ]
                marks.append(time.perf_counter())
                rows = [row for a in arrays for row in self.encoder.check(a.input_ids, a.length)]
                marks.append(time.perf_counter())
                self.encoder.embed(rows)
                marks.append(time.perf_counter())
                encode, pad, check, embed = np.diff(marks).tolist()
                spent = encode, pad, check, inner[-1], embed - inner[-1]
                for values, one in zip(taken.values(), spent, strict=True):
                    values.append(one * 1e6)
        finally:
            self.encoder._engine = engine
        warm = {name: values[len(values) // 10 :] for name, values in taken.items()}
        return InProcess(len(texts[0]), *(Sample.of(values) for values in warm.values()))

    def for_load(self, seen: Seen, *, mix: bool, rounds: int) -> InProcess:
        """The same for batches like those that a load made."""
        source = Texts(seed=41)
        make = mixed if mix else short
        size = max(1, round(seen.batch))
        return self.time([[make(source) for _ in range(size)] for _ in range(rounds)])


def take_apart(seen: Seen, inside: InProcess, *, no_op: bool = False) -> Where:
    """A load's time as parts that add up to what the caller sees.

    What Triton counts as computing is divided further by what the same work takes in this process,
    of which there is none in an encoder that does nothing; what is left of it is the Python
    backend, and waiting for cores.
    """
    passes = list(zip(seen.mean_us, seen.passes, strict=True))
    parts: list[Part] = []

    def add(where: str, name: str, values: Sequence[float]) -> None:
        parts.append(Part(where, name, Sample.of(list(values))))

    def of(model: str, stage: str) -> list[float]:
        return [counts[model].us(stage) for _, counts in passes]

    def divide(model: str, known: dict[str, Sample]) -> None:
        for name, sample in known.items():
            parts.append(Part(model, name, sample))
        spent = sum(sample.median for sample in known.values())
        rest = [value - spent for value in of(model, "infer")]
        add(model, "infer: the rest", rest)

    add(
        "client",
        "gRPC, loopback, the caller's own loop",
        [mean - counts[MODEL].us("total") for mean, counts in passes],
    )
    add(
        "ensemble",
        "cache and hand-over between models",
        [
            counts[MODEL].us("total") - counts[TOKENIZER].us("total") - counts[ENCODER].us("total")
            for _, counts in passes
        ],
    )
    for model in (TOKENIZER, ENCODER):
        add(model, "queue", of(model, "queue"))
        add(model, "input", of(model, "input"))
        if model == TOKENIZER:
            divide(model, {"infer: encode": inside.encode, "infer: pad": inside.pad})
        else:
            divide(
                model,
                {}
                if no_op
                else {
                    "infer: check": inside.check,
                    "infer: engine": inside.engine,
                    "infer: rest of embed": inside.rest,
                },
            )
        add(model, "output", of(model, "output"))
        stages = ("queue", "input", "infer", "output")
        add(
            model,
            "counted by no stage",
            [c[model].us("total") - sum(c[model].us(s) for s in stages) for _, c in passes],
        )
    return Where(seen, inside, parts)
