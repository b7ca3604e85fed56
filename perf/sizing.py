# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.sizing`: how many servers, and what happens to a fleet of them, as a page.

Nothing is measured here: one server's figures come out of perf/results (profile.json,
results.json), and a fleet of such servers is simulated (`sizing_fleet.py`). How far one simulated
server is from the measured one stands at the beginning of the page.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
from tqdm import tqdm

from arrowhead_server.triton import CACHED_VECTORS
from perf import sizing_page
from perf.common import OUT
from perf.machine import ROOT
from perf.profile_load import infer_request
from perf.profile_server import zipf_ranks
from perf.report import marked
from perf.sizing_events import ROOM, Scaler, deaths, rolling
from perf.sizing_fleet import RULES, Answers, Fleet, Times, bursty, poisson
from perf.sizing_results import (
    Cached,
    Capacity,
    Check,
    Disturbed,
    Memory,
    Needed,
    Point,
    SizingResults,
    Spare,
    Step,
    Wire,
)
from perf.sizing_service import (
    MIXED_TOKENS,
    SHORT_TOKENS,
    Load,
    Service,
    loads,
    mixed,
    read,
    service,
    short,
)
from perf.texts import Texts
from perf.texts import mixed as mixed_text

DTYPES = ("float32", "bfloat16", "int8")
LONG_TOKENS = 256
PLANNED = 0.6  # of a replica's most: what a day's rate is counted at
LIMIT_MS = 250.0  # a p99 that is quiet again
VCPUS = 2  # of a replica: as many as the machine had that was measured
MONTH_S = 30 * 86_400.0
# Assumptions, named on the page.
DIES_EVERY_S, BACK_AFTER_S = (
    20.0,
    2.0,
)  # far too often; `arrowhead serve` is back in about that
ROLL_S = 20.0  # a drain of 15 s, a stop, a start
STARTS_S = (20.0, 120.0)  # image and node are there; a node must come first
AWAY = (1e-4, 1e-3, 1e-2)  # share of the time that a replica is away by itself
_IDLE = 0.02  # of a fleet: its latency is that of one request alone
MOST_BUSY = 0.9  # what comes nearer to all falls behind at the least disturbance
DIFFERENT, EXPONENT, DIMENSION = (20_000, 100_000, 1_000_000), 1.0, 384
MEMORIES, ENTRIES = (1, 3, 10, 30), (1_000, CACHED_VECTORS, 50_000)
VOCABULARY = 30_522  # BERT's; the measured models of other sizes have none to speak of
ARRIVALS: dict[str, Callable[[np.random.Generator, float, float], Times]] = {
    "poisson": poisson,
    "bursty": bursty,
}


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        requests: of each steady load. loop_s: of each closed loop. scene_s: of what happens.
        fleets, busy: replicas and loads of the curves. rates: that replicas are counted for.
        drawn: texts, of each memory.
    """

    requests: int
    loop_s: float
    scene_s: float
    fleets: tuple[int, ...]
    busy: tuple[float, ...]
    rates: tuple[float, ...]
    targets_ms: tuple[float, ...]
    drawn: int


FULL = Effort(
    requests=100_000,
    loop_s=60.0,
    scene_s=120.0,
    fleets=(1, 3, 10, 30),
    busy=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    rates=(10.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0),
    targets_ms=(25.0, 50.0, 100.0),
    drawn=400_000,
)
QUICK = Effort(
    requests=2_000,
    loop_s=5.0,
    scene_s=30.0,
    fleets=(1, 3),
    busy=(0.5, 0.8),
    rates=(10.0, 300.0),
    targets_ms=(100.0,),
    drawn=20_000,
)


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run of some seconds; its figures are rough.")
@click.option(
    "--figures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=OUT,
    show_default="perf/results",
    help="Where profile.json and results.json are.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=OUT,
    show_default="perf/results",
    help="Where to write.",
)
def main(quick: bool, figures: Path, out: Path) -> None:
    """Count servers: latency over load, replicas for a rate, deaths, updates, steps, caches.

    \b
    Example:
      python -m perf.profile && python -m perf.sizing     # for this machine
    """  # noqa: D301 (click reads the character)
    try:
        profile, results = read(figures, "profile.json"), read(figures, "results.json")
    except (OSError, ValueError) as error:
        raise click.ClickException(
            f"no figures of one server ({error}): run `make profile` and `make perf` first"
        ) from error
    found = simulate(QUICK if quick else FULL, profile, results, quick=quick)
    out.mkdir(parents=True, exist_ok=True)
    drawn = sizing_page.draw(found, out)
    (out / "sizing.json").write_text(found.to_json(), encoding="utf-8")
    (out / "sizing.md").write_text(sizing_page.page(found, drawn), encoding="utf-8")
    guide = ROOT / "docs" / "sizing.md"
    if out == OUT and not quick:
        text = guide.read_text(encoding="utf-8")
        guide.write_text(marked(text, "sizing", sizing_page.summary(found)), encoding="utf-8")
    click.echo(str(out / "sizing.md"))


def simulate(effort: Effort, profile: Any, results: Any, *, quick: bool) -> SizingResults:
    """All parts."""
    one = service(profile, results["dtype"])
    parts: dict[str, Callable[[], Any]] = {}
    checks = [_check(one, load, effort.loop_s) for load in loads(profile, results)]
    margin = max(check.too_fast for check in checks)
    slower, tail = one.slower(margin), max(1.0, max(check.tail for check in checks) / margin)
    parts["curves"] = lambda: [
        _point(one, count, busy, effort.requests) for count in effort.fleets for busy in effort.busy
    ]
    parts["rules"] = lambda: [
        _point(one, effort.fleets[-2], 0.6, effort.requests, rule=rule, arrivals=arrivals)
        for arrivals in ARRIVALS
        for rule in RULES
    ]
    parts["needed"] = lambda: [
        _needed(slower, tail, rate, target, effort.requests)
        for target in effort.targets_ms
        for rate in effort.rates
    ]
    parts["disturbed"] = lambda: [
        _disturbed(one, what, count, busy, effort.scene_s)
        for what in ("a replica dies", "rolling update")
        for count in effort.fleets[1:3]
        for busy in (0.5, 0.7, 0.8)
    ]
    parts["steps"] = lambda: [
        _step(one, times, start_s, effort.scene_s) for start_s in STARTS_S for times in (2.0, 4.0)
    ]
    parts["cached"] = lambda: _cached(effort.drawn)
    found = {name: part() for name, part in tqdm(parts.items(), disable=None)}
    return SizingResults(
        quick=quick,
        cpu=profile["machine"]["cpu"],
        cores=profile["machine"]["cores"],
        revision=profile["machine"]["revision"],
        date=profile["machine"]["date"],
        service=one,
        checks=checks,
        margin=margin,
        tail=tail,
        planned=PLANNED,
        capacities=_capacities(profile),
        spares=_spares(),
        wires=_wires(),
        memory=_memory(profile, results),
        **found,
    )


def _check(one: Service, load: Load, seconds: float) -> Check:
    fleet = Fleet(one, 1, balancers=1)
    fleet.loop(load.clients, mixed if load.tokens == "mixed" else short)
    answers = fleet.run(seconds)
    return Check(load, answers.percentile(50), answers.percentile(99), answers.requests_s)


def _capacities(profile: Any) -> list[Capacity]:
    found = []
    for dtype in DTYPES:
        one = service(profile, dtype)
        for tokens in (SHORT_TOKENS, MIXED_TOKENS, LONG_TOKENS):
            most = one.most_s(tokens)
            hours = 1e6 / (most * PLANNED) * VCPUS / 3600
            found.append(Capacity(dtype, tokens, most, hours))
    return found


def _steady(fleet: Fleet, rate_s: float, requests: int, arrivals: str = "poisson") -> Answers:
    """A steady load's answers, but for the first tenth, in which queues fill."""
    seconds = requests / rate_s
    fleet.arrive(ARRIVALS[arrivals](fleet.random, rate_s, seconds), mixed)
    return fleet.run().between(seconds / 10, seconds)


def _point(
    one: Service,
    count: int,
    busy: float,
    requests: int,
    *,
    rule: str = "least requests",
    arrivals: str = "poisson",
) -> Point:
    answers = _steady(
        Fleet(one, count, rule=rule), busy * count * one.most_s(MIXED_TOKENS), requests, arrivals
    )
    return Point(
        count, rule, arrivals, busy, *(answers.percentile(percent) for percent in (50, 99, 99.9))
    )


def _needed(one: Service, tail: float, rate_s: float, target_ms: float, requests: int) -> Needed:
    """The fewest whose p99 is within the target, were it `tail` times as high as simulated."""
    most = one.most_s(MIXED_TOKENS)
    count = max(1, math.ceil(rate_s / (most * MOST_BUSY)))
    while True:
        p99 = tail * _steady(Fleet(one, count), rate_s, requests).percentile(99)
        busy = rate_s / (count * most)
        if p99 <= target_ms:
            return Needed(rate_s, target_ms, count, busy, p99)
        if busy < _IDLE:  # one request alone takes longer than that
            return Needed(rate_s, target_ms, 0, 0.0, p99)
        count += max(1, count // 20)


def _disturbed(one: Service, what: str, count: int, busy: float, seconds: float) -> Disturbed:
    rate = busy * count * one.most_s(MIXED_TOKENS)
    seconds = max(seconds, 1.2 * count * ROLL_S)
    quiet = _steady(Fleet(one, count), rate, round(rate * seconds)).percentile(99)
    fleet = Fleet(one, count)
    fleet.arrive(poisson(fleet.random, rate, seconds), mixed)
    if what == "rolling update":
        fleet.environment.process(rolling(fleet, seconds / 10, ROLL_S))
    else:
        fleet.environment.process(deaths(fleet, seconds / 10, DIES_EVERY_S, BACK_AFTER_S))
    answers = fleet.run(2 * seconds).between(seconds / 10, seconds)
    p99, p999, most = (answers.percentile(percent) for percent in (99, 99.9, 100))
    return Disturbed(what, count, busy, quiet, p99, p999, most)


def _step(one: Service, times: float, start_s: float, seconds: float) -> Step:
    count, busy = 3, 0.6
    most = one.most_s(MIXED_TOKENS)
    before = busy * count * most
    at, end = seconds / 4, 4 * seconds
    fleet = Fleet(one, count, room=ROOM)
    fleet.arrive(poisson(fleet.random, before, at), mixed)
    later = poisson(fleet.random, before * times, end - at) + at * 1e3
    fleet.arrive(later, mixed)
    scaler = Scaler(fleet, start_s, most=12, sizes=[])
    fleet.environment.process(scaler.run())
    answers = fleet.run(end)
    enough = math.ceil(before * times / most)
    return Step(
        times,
        start_s,
        len(fleet.replicas),
        next((when - at for when, _ in scaler.sizes), None),
        next((when - at for when, size in scaler.sizes if size >= enough), None),
        _quiet_again(answers, at, end),
        len(fleet.refused) / len(later),
        answers.between(at, at + 60).percentile(99),
    )


def _quiet_again(answers: Answers, at: float, end: float) -> float | None:
    """Seconds after `at` from which on p99 of each second is within the limit."""
    last = at
    for second in np.arange(at, end - 5):  # of the last ones, some are not answered yet
        some = answers.between(second, second + 1)
        if len(some.ms) and some.percentile(99) > LIMIT_MS:
            last = second + 1
    return None if last >= end - 5 else last - at


def _spares() -> list[Spare]:
    return [
        Spare(needed, spare, away, MONTH_S * _short(needed, needed + spare, away))
        for needed in (2, 9, 29)
        for spare in (0, 1, 2)
        for away in AWAY
    ]


def _short(needed: int, count: int, away: float) -> float:
    """The share of time with fewer than `needed` of `count`, each away by itself."""
    return sum(
        math.comb(count, up) * (1 - away) ** up * away ** (count - up) for up in range(needed)
    )


def _cached(drawn: int) -> list[Cached]:
    found = []
    for different in DIFFERENT:
        ranks = zipf_ranks(different, EXPONENT, drawn).tolist()
        sizes = [(entries, 1) for entries in ENTRIES]
        if different == DIFFERENT[1]:
            sizes += [(CACHED_VECTORS, count) for count in MEMORIES[1:]]
        for entries, count in sizes:
            hits = _hits(ranks, entries, count)
            early, late = hits[: drawn // 10], hits[drawn // 2 :]
            found.append(
                Cached(different, entries, count, sum(early) / len(early), sum(late) / len(late))
            )
    return found


def _hits(ranks: list[int], entries: int, count: int) -> list[bool]:
    """Which requests are answered by memories that forget what was used longest ago."""
    chosen = np.random.default_rng(7).integers(0, count, len(ranks)).tolist()
    memories: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(count)]
    hits = []
    for rank, at in zip(ranks, chosen, strict=True):
        memory = memories[at]
        hits.append(rank in memory)
        memory[rank] = None
        memory.move_to_end(rank)
        if len(memory) > entries:
            memory.popitem(last=False)
    return hits


def _wires() -> list[Wire]:
    texts = [mixed_text(source) for source in [Texts(seed=9)] for _ in range(200)]
    vector = np.random.default_rng(8).standard_normal(DIMENSION).astype(np.float32)
    vector /= np.linalg.norm(vector)
    request = float(np.mean([len(infer_request([text])) for text in texts]))
    orders = [orjson.dumps({"model": "minilm", "input": text}) for text in texts]
    asked = float(np.mean([len(order) for order in orders]))
    numbers = len(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))
    return [
        Wire("gRPC, `ModelInfer`", request, 4.0 * DIMENSION),
        Wire("gateway, base64", asked, 4 * math.ceil(4 * DIMENSION / 3)),
        Wire("gateway, JSON numbers", asked, float(numbers)),
    ]


def _memory(profile: Any, results: Any) -> list[Memory]:
    measured = {one["name"]: one["pss_mb"] for one in results["server"]["loaded"]}
    whole = sum(measured.values())
    processes = {
        one["count"]: sum(each["pss_mb"] for each in one["loaded"]) for one in profile["instances"]
    }
    another = processes[2] - processes[1]
    stored = results["weights"]["parquet_bytes"] / 1e6
    found = [Memory("MiniLM-L6", stored / 2, whole, another, is_measured=True)]
    for size in profile["scaling"]["sizes"]:
        if size["dtype"] == results["dtype"] and size["width"] > DIMENSION:
            millions = (size["parameters"] + VOCABULARY * size["width"]) / 1e6
            name = f"{size['width']} wide, {size['layers']} layers"
            # Weights are float16 in the file and stay so; the rest is taken to be as MiniLM's.
            found.append(Memory(name, millions, whole - stored + 2 * millions, None, False))
    return found


if __name__ == "__main__":
    main()
