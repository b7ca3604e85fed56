# SPDX-License-Identifier: Apache-2.0
"""A running server under three further loads: long texts in the way, repeated texts, instances."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.copies import with_instances
from perf.profile_load import Latency, Sent, Stream, infer_request, run
from perf.profile_stats import metrics, statistics
from perf.profile_time import LOADED_CLIENTS, new_requests
from perf.server import MODEL, ProcessMemory, Served, served
from perf.texts import Texts, of_tokens

LONG_TOKENS = 256
CLIENT_TEXTS = 32  # in a request of `Client`, unless it is told otherwise
MOST_TEXTS = 100  # in a request
DIFFERENT = 20_000
EXPONENT = 1.0
_HITS, _MISSES = "nv_cache_num_hits_per_model", "nv_cache_num_misses_per_model"


@dataclass(frozen=True)
class Line:
    """Short texts from one caller while another sends something long.

    Attributes:
        beside: what the other sends, one request after the other.
        alone: the latency of that alone, if it is anything.
        short: the latency of the short ones meanwhile.
        long: that of the long ones.
    """

    beside: str
    alone: Latency | None
    short: Latency
    long: Latency | None


def head_of_line(server: Served, source: Texts, *, largest: int, seconds: float) -> list[Line]:
    """Short texts beside nothing, beside long texts, and beside requests of up to `largest`."""
    cases = [0, 1, *([CLIENT_TEXTS] if largest > CLIENT_TEXTS else []), largest]
    # Those of many texts take long each, and some must pass by.
    return [
        beside(server, source, texts, seconds=seconds * (2.5 if texts > CLIENT_TEXTS else 1))
        for texts in cases
    ]


def beside(server: Served, source: Texts, texts: int, *, seconds: float) -> Line:
    """Short texts while another caller sends requests of so many texts of 256 tokens."""
    streams = [Stream(server.address, new_requests(source, seconds), 1, seconds)]
    if not texts:
        return Line("nothing", None, Latency.of(run(*streams)), None)
    make = of_tokens(LONG_TOKENS)
    # More of them than can be answered would only take time to make.
    few = int(seconds * 200 / texts) + 3
    requests = [infer_request([make(source) for _ in range(texts)]) for _ in range(2 * few)]
    alone = run(Stream(server.address, requests[:few], 1, seconds / 4))
    streams.append(Stream(server.address, requests[few:], 1, seconds))
    short, long = run(*streams)
    return Line(
        f"{texts} x {LONG_TOKENS} tokens",
        Latency.of(alone),
        Latency.of([short]),
        Latency.of([long]),
    )


@dataclass(frozen=True)
class Third:
    """A third of the repeated texts' run.

    Attributes:
        latency: of its requests.
        hits, misses: by Triton's statistics.
        possible: the share of its requests whose text had been sent before, in this third or
            an earlier one: what a cache of any size could answer.
    """

    latency: Latency
    hits: int
    misses: int
    possible: float

    @property
    def hit_rate(self) -> float:
        """The share of requests that the cache answered."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(frozen=True)
class Repeated:
    """Texts that come again, some much more often than others.

    Attributes:
        different: texts there are. exponent: Zipf's. clients: requests in flight at once.
        latency: of all requests.
        thirds: of the run, one after the other, beginning with an empty cache.
        hits, misses: by Triton's statistics; counted_hits, counted_misses: by its metrics.
    """

    different: int
    exponent: float
    clients: int
    latency: Latency
    thirds: list[Third]
    hits: int
    misses: int
    counted_hits: int
    counted_misses: int


def zipf_ranks(
    different: int, exponent: float, count: int, seed: int = 51
) -> npt.NDArray[np.int64]:
    """Draws `count` ranks below `different`, rank r with a weight of 1 / (r + 1) ^ exponent."""
    weights = 1 / np.arange(1, different + 1) ** exponent
    upper = np.cumsum(weights) / weights.sum()
    drawn = np.random.default_rng(seed).random(count)
    return np.minimum(np.searchsorted(upper, drawn, side="right"), different - 1)


def repeated_texts(server: Served, *, seconds: float, most_a_second: int = 6000) -> Repeated:
    """Sends texts by Zipf's law to a server whose cache holds none of them."""
    source = Texts(seed=52)
    texts = [infer_request([source.of_words(5, 60)]) for _ in range(DIFFERENT)]
    ranks = zipf_ranks(DIFFERENT, EXPONENT, int(seconds * most_a_second))
    before, counted = statistics(server)[MODEL], metrics(server.address)
    sent: list[Sent] = []
    thirds: list[Third] = []
    known: set[int] = set()
    place = 0
    for _ in range(3):
        began = statistics(server)[MODEL]
        own = (texts[rank] for rank in ranks[place:])
        sent += run(Stream(server.address, own, LOADED_CLIENTS, seconds / 3))
        counts = statistics(server)[MODEL].since(began)
        drawn = ranks[place : place + len(sent[-1].ms)].tolist()
        place += len(drawn)
        new = set(drawn) - known
        known |= new
        thirds.append(
            Third(Latency.of(sent[-1:]), counts.hits, counts.misses, 1 - len(new) / len(drawn))
        )
    counts, after = statistics(server)[MODEL].since(before), metrics(server.address)
    everything = Sent(
        list(itertools.chain.from_iterable(one.ms for one in sent)),
        sum(one.seconds for one in sent),
    )
    return Repeated(
        DIFFERENT,
        EXPONENT,
        LOADED_CLIENTS,
        Latency.of([everything]),
        thirds,
        counts.hits,
        counts.misses,
        int(after[_HITS, MODEL] - counted[_HITS, MODEL]),
        int(after[_MISSES, MODEL] - counted[_MISSES, MODEL]),
    )


@dataclass(frozen=True)
class Instances:
    """The server with so many processes of the encoder.

    Attributes:
        first_answer_s: from the start of the process to the first embedding.
        mixed: new texts of 5 to 60 words from 32 callers.
        line: short texts beside the largest requests.
        idle, loaded: memory after the first text, and after the load.
    """

    count: int
    first_answer_s: float
    mixed: Latency
    line: Line
    idle: list[ProcessMemory]
    loaded: list[ProcessMemory]


def instances(
    repository: Path,
    counts: Sequence[int],
    *,
    passes: int,
    seconds: float,
    largest: int,
    line_s: float,
    say: Callable[[str], None],
) -> list[Instances]:
    """Starts the server anew for each count."""
    found: list[Instances] = []
    for count in counts:
        say(f"instances: {count}")
        source = Texts(seed=60 + count)
        requests = [new_requests(source, seconds, mix=True) for _ in range(passes + 1)]
        with tempfile.TemporaryDirectory(prefix="arrowhead-profile-") as name:
            copy = with_instances(repository, Path(name) / "repository", count)
            with served(copy) as server:
                with server.client() as client:
                    client.embed("the first text this server ever sees")
                    answered = time.perf_counter() - server.began
                idle = server.memory()
                run(Stream(server.address, requests[0], LOADED_CLIENTS, min(seconds, 1.0)))
                sent = [
                    run(Stream(server.address, own, LOADED_CLIENTS, seconds))[0]
                    for own in requests[1:]
                ]
                loaded = server.memory()
                line = beside(server, source, largest, seconds=line_s)
                latency = Latency.of(sent)
                found.append(Instances(count, answered, latency, line, idle, loaded))
    return found
