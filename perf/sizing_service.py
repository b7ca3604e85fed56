# SPDX-License-Identifier: Apache-2.0
"""What one server takes, told in five numbers out of `perf.profile`'s figures.

A step of the encoder takes all requests that wait. It holds the server for

    step_ms + texts * text_ms + tokens * token_ms

- step_ms, token_ms: a line through what the engine takes for batches of all sizes (profile.json,
  scaling)
- text_ms: what a request takes beside that, of the cores that both share: Triton, tokenizer, gRPC
  (the rate with an encoder that computes nothing)
- way_ms: what a caller waits beside that, without holding anybody up (one text alone, less that)

times a number around 1 (lognormal), another one for each step: of one text, as wide as p50 and p99
of one text alone are apart; of n texts, which vary each for itself, a square root of n less wide.
Loads that none of these were taken from say how far all that is from the truth (`loads`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perf.stats import Sample

MOST_TEXTS = 100  # max_batch_size of the encoder
SHORT_TOKENS = 12  # of the texts that `perf.profile` sends alone
WORDS = (5, 60)  # of mixed texts, evenly spread; as many tokens and two more

Tokens = Callable[[np.random.Generator, int], "np.typing.NDArray[np.int64]"]


def short(random: np.random.Generator, count: int) -> np.typing.NDArray[np.int64]:
    """Tokens of texts that are all alike."""
    return np.full(count, SHORT_TOKENS)


def mixed(random: np.random.Generator, count: int) -> np.typing.NDArray[np.int64]:
    """Tokens of texts of 5 to 60 words."""
    return random.integers(WORDS[0] + 2, WORDS[1] + 3, count)


_NORMAL_P99 = 2.326  # standard deviations below which 99 % of a normal distribution lie
MIXED_TOKENS = (WORDS[0] + WORDS[1]) / 2 + 2


@dataclass(frozen=True)
class Service:
    """One server with one encoder process.

    Attributes:
        dtype: what it computes in.
        step_ms, text_ms, token_ms, way_ms: as the module says.
        spread: of the lognormal's logarithm for one text (standard deviation).
        off: the line's typical distance from the engine's figures, as a share of them.
    """

    dtype: str
    step_ms: float
    text_ms: float
    token_ms: float
    way_ms: float
    spread: float
    off: float

    def hold_ms(self, texts: int, tokens: int) -> float:
        """How long a step of so many texts, and tokens together, holds the server on average."""
        return self.step_ms + texts * self.text_ms + tokens * self.token_ms

    def slower(self, factor: float) -> Service:
        """A server that takes so many times as long for everything."""
        step, text, token, way = (
            factor * ms for ms in (self.step_ms, self.text_ms, self.token_ms, self.way_ms)
        )
        return replace(self, step_ms=step, text_ms=text, token_ms=token, way_ms=way)

    def most_s(self, tokens: float) -> float:
        """Texts a second of such a length that it computes at most, in full steps."""
        return MOST_TEXTS / self.hold_ms(MOST_TEXTS, round(MOST_TEXTS * tokens)) * 1e3


@dataclass(frozen=True)
class Load:
    """A measured closed loop, which the simulation is compared with.

    Attributes:
        source: the file that it stands in.
        clients: each sends its next text as soon as its last one is answered.
        tokens: "short" or "mixed".
    """

    title: str
    source: str
    clients: int
    tokens: str
    p50_ms: Sample
    p99_ms: Sample
    requests_s: Sample


def read(folder: Path, name: str) -> Any:
    """The figures of one command."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def service(profile: Any, dtype: str) -> Service:
    """The five numbers of a dtype, out of profile.json. Only the engine's differ by dtype."""
    points = [
        (point["texts"] * point["tokens"], point["us"]["median"] / 1e3)
        for series in profile["scaling"]["series"]
        if series["dtype"] == dtype
        for point in series["points"]
    ]
    tokens = np.array([point[0] for point in points], float)
    ms = tokens * np.array([point[1] for point in points])
    # Each figure counts alike, so what is minimized is the share by which the line is off.
    (step, token), *_ = np.linalg.lstsq(
        np.stack([1 / ms, tokens / ms], axis=1), np.ones(len(ms)), rcond=None
    )
    off = float(np.median(np.abs((step + token * tokens) / ms - 1)))
    text = 1e3 / _overhead(profile, "a new text, no-op encoder")["several"]["requests_s"]["median"]
    alone = _where(profile, 1)
    engine = _part(alone, "infer: engine") / 1e3
    way = float(np.mean(alone["seen"]["mean_us"])) / 1e3 - engine - text
    seen = alone["seen"]["latency"]
    p50, p99 = (seen[key]["median"] - way for key in ("p50_ms", "p99_ms"))
    spread = float(np.log(p99 / p50)) / _NORMAL_P99
    return Service(dtype, float(step), text, float(token), way, spread, off)


def loads(profile: Any, results: Any) -> list[Load]:
    """All closed loops of one server, of texts that come once.

    Those of perf_analyzer (results.json) only if they are of the same processor as the profile.
    """
    found = [
        _load(
            "16 clients, 12 tokens",
            "profile.json",
            16,
            "short",
            _overhead(profile, "a new text")["several"],
        ),
        _load(
            "32 clients, 5-60 words",
            "profile.json",
            32,
            "mixed",
            _where(profile, 32)["seen"]["latency"],
        ),
    ]
    if results["machine"]["cpu"] == profile["machine"]["cpu"]:
        for one in results["server"]["loads"]:
            if one["key"].startswith("mixed_"):
                clients = one["concurrency"]
                title = f"{clients} client{'s' * (clients > 1)}, 5-60 words"
                found.append(_load(title, "results.json", clients, "mixed", one))
    return found


def _load(title: str, source: str, clients: int, tokens: str, figures: Any) -> Load:
    p50, p99, rate = (Sample(**figures[key]) for key in ("p50_ms", "p99_ms", "requests_s"))
    return Load(title, source, clients, tokens, p50, p99, rate)


def _overhead(profile: Any, title: str) -> Any:
    return next(one for one in profile["time"]["overheads"] if one["title"] == title)


def _where(profile: Any, clients: int) -> Any:
    return next(one for one in profile["time"]["where"] if one["seen"]["clients"] == clients)


def _part(where: Any, name: str) -> float:
    return float(next(one["us"]["median"] for one in where["parts"] if one["name"] == name))
