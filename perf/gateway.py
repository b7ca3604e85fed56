# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.gateway`: what the gateway costs, and what it saves, as a page.

1. New texts over every way, by callers: what JSON over HTTP adds to gRPC.
2. One known text.
3. A hundred texts of which one is new.
4. One new text that many ask for at the same moment.
5. Texts that come again, some much more often than others.
6. Start and memory.

Beside ours runs the application that one would write in a minute (`gateway_naive.py`). In 1 and 2
the ways take turns, so that drift touches all alike; in 3 to 5 one comes after the other, and 5 is
one run of each.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from perf import gateway_page
from perf.common import common_options, end_as_ctrl_c_does
from perf.gateway_results import (
    CALLERS,
    TOKENS,
    Again,
    Batch,
    GatewayResults,
    Loaded,
    Outset,
    Same,
)
from perf.gateway_roads import PART, direct, gateway, gateway_command, naive, naive_command
from perf.machine import Bystanders, describe
from perf.peers.environments import PeerUnavailable
from perf.peers.generator import Measured, closed_loop
from perf.peers.roads import Road, WrongAnswer
from perf.peers.servers import Door, Running, first_answer, free_port, started
from perf.profile_server import DIFFERENT, EXPONENT, zipf_ranks
from perf.profile_stats import statistics
from perf.server import MODEL, Served, ServeFailed, served
from perf.stats import Sample
from perf.texts import Texts, mixed, of_tokens

_MOST_A_SECOND = 20_000  # texts that come again, drawn beforehand
_COUNTED_S = 0.05
_new = of_tokens(TOKENS)


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        passes, load_s: runs of each load, and seconds of each.
        rounds: batches with one new text, and new texts that all ask for at once.
        again_s: seconds of texts that come again.
        starts: of each application.
    """

    passes: int
    load_s: float
    rounds: int
    again_s: float
    starts: int


FULL = Effort(passes=3, load_s=2.0, rounds=50, again_s=10.0, starts=5)
QUICK = Effort(passes=1, load_s=0.2, rounds=3, again_s=0.5, starts=1)


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run of half a minute; its figures are rough.")
@common_options
def main(quick: bool, repository: Path, out: Path) -> None:
    """Measure the gateway: beside gRPC, beside a naive one, and what its memory of texts saves."""
    end_as_ctrl_c_does()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here leaves the machine
    try:
        results = uvloop.run(measure(QUICK if quick else FULL, repository))
    except (PeerUnavailable, ServeFailed, WrongAnswer, OSError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    drawn = gateway_page.draw(results, out)
    (out / "gateway.json").write_text(results.to_json(), encoding="utf-8")
    (out / "gateway.md").write_text(gateway_page.page(results, drawn), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'gateway.md'}")


async def measure(effort: Effort, repository: Path) -> GatewayResults:
    """All parts, in front of one server."""
    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f} s] {step}", err=True)

    machine, others = describe(), Bystanders()
    others.look()
    port, naive_port = free_port(), free_port()
    with served(repository) as server:

        def ours() -> AbstractContextManager[Running]:
            return started(gateway_command(server, port), gateway(port))

        def other() -> AbstractContextManager[Running]:
            return started(naive_command(server, naive_port), [naive(naive_port)])

        say("starts")
        starts = [await _starts(make, effort.starts) for make in (ours, other)]
        others.look()
        with ours() as first, other() as second:
            for running in (first, second):
                await first_answer(running)
            doors = [*direct(server), *second.doors, *first.doors]
            parts = _Parts(server, port, doors, effort)
            say("new texts")
            loads = await parts.loads(others.look)
            say("known texts")
            known = await parts.known()
            others.look()
            say("batches, and one text for all")
            batches, same = await parts.batches(), await parts.same()
            say("texts that come again")
            again = await parts.again()
            loaded = first.pss_mb(), second.pss_mb()
        others.look()
        return GatewayResults(
            machine=machine,
            quick=effort is QUICK,
            seconds=time.monotonic() - began,
            other_work=Sample.of(others.percent),
            triton=str(server.get("/v2")["version"]),
            loads=loads,
            known=known,
            batches=batches,
            same=same,
            again=again,
            outsets=[
                Outset(title, *outset, loaded_mb)
                for title, outset, loaded_mb in zip(
                    ("gateway", "naive FastAPI"), starts, loaded, strict=True
                )
            ],
        )


async def _starts(
    make: Callable[[], AbstractContextManager[Running]], count: int
) -> tuple[Sample, Sample]:
    """Seconds to the first vector, and PSS in MB after it."""
    seconds, memory = [], []
    for _ in range(count):
        with make() as running:
            seconds.append(await first_answer(running))
            memory.append(running.pss_mb())
    return Sample.of(seconds), Sample.of(memory)


class _Parts:
    """The loads, on applications that run already."""

    def __init__(self, server: Served, port: int, doors: Sequence[Door], effort: Effort) -> None:
        self._server, self._port, self._doors, self._effort = server, port, doors, effort
        self._texts = Texts(seed=81)  # none of them comes twice in the whole run

    async def loads(self, between: Callable[[], None]) -> list[Loaded]:
        """New texts, a text a request."""
        return await self._passes(CALLERS, lambda: [_new(self._texts)], between)

    async def known(self) -> list[Loaded]:
        """One text over and over, which whoever can remember remembers."""
        text = [_new(self._texts)]
        return await self._passes((CALLERS[0], CALLERS[-1]), lambda: text, lambda: None)

    async def batches(self) -> list[Batch]:
        """As many texts as one request to Triton holds; all but one had been asked for."""
        known = [_new(self._texts) for _ in range(PART - 1)]
        rounds = self._effort.rounds
        found = []
        for door in self._doors:
            async with _roads(door, 1) as (road,), _roads(self._doors[0], 1) as (aside,):
                await road.embed(known)
                before, ms = await self._asked(), []
                for _ in range(rounds):
                    # The encoder remembers its last step, which is seldom the same caller's.
                    await aside.embed([_new(self._texts)])
                    ms += [await _ms(road, [*known, _new(self._texts)])]
                asked = (await self._asked() - before) / rounds - 1
            found.append(Batch(door.key, door.title, Sample.of(ms), asked))
        return found

    async def same(self) -> list[Same]:
        """A new text that all callers ask for at the same moment."""
        rounds = self._effort.rounds
        found = []
        for door in self._doors:
            async with _roads(door, CALLERS[-1]) as roads:
                await asyncio.gather(*(road.embed(["connected"]) for road in roads))
                before, ms = await self._asked(), []
                for _ in range(rounds):
                    text = [_new(self._texts)]
                    ms += await asyncio.gather(*(_ms(road, text) for road in roads))
                asked = (await self._asked() - before) / rounds
            found.append(Same(door.key, door.title, Sample.of(ms), asked))
        return found

    async def again(self) -> list[Again]:
        """Texts by Zipf's law, others for each way: a memory shall know none of them."""
        seconds = self._effort.again_s
        ranks = zipf_ranks(DIFFERENT, EXPONENT, int(seconds * _MOST_A_SECOND)).tolist()
        found = []
        for seed, door in enumerate(self._doors, start=82):
            source = Texts(seed)
            make = _Drawn([mixed(source) for _ in range(DIFFERENT)], ranks)
            before = self._gateway_counts(), self._server.cache_counts()
            measured = await _timed(door, CALLERS[-1], make, seconds)
            ours, triton = self._gateway_counts(), self._server.cache_counts().since(before[1])
            counts = {how: ours[how] - before[0][how] for how in ours}
            total = sum(counts.values())  # none if it is not the gateway that is asked
            found.append(
                Again(
                    door.key,
                    door.title,
                    make.count,
                    measured.requests_s,
                    measured.p50_ms,
                    measured.p99_ms,
                    possible=1 - make.different / make.count,
                    hit=(counts["hit"] if total else triton.hits) / make.count,
                    merged=counts["merged"] / make.count if total else None,
                )
            )
        return found

    async def _passes(
        self, callers: Sequence[int], make: Callable[[], list[str]], between: Callable[[], None]
    ) -> list[Loaded]:
        """All ways take turns; a first pass, which warms them, does not count."""
        runs: dict[tuple[int, str], list[Measured]] = {}
        for number in range(self._effort.passes + 1):
            between()
            for count in callers:
                for door in self._doors:
                    measured = await _timed(door, count, make, self._effort.load_s)
                    if number:
                        runs.setdefault((count, door.key), []).append(measured)
        base = self._doors[0].key
        return [
            _loaded(door, count, runs[count, door.key], runs[count, base])
            for count in callers
            for door in self._doors
        ]

    async def _asked(self) -> int:
        """Texts that the encoder has been asked for, by Triton's statistics."""
        asked = -1
        # It counts a request after it has answered it: what is counted stands still, or is awaited.
        while asked != (asked := statistics(self._server)[f"{MODEL}_encoder"].texts):
            await asyncio.sleep(_COUNTED_S)
        return asked

    def _gateway_counts(self) -> dict[str, float]:
        """Of texts, by what the gateway did about them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics") as page:
            text = page.read().decode()
        return {
            sample.labels["how"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "arrowhead_gateway_texts_total"
        }


class _Drawn:
    """Gives texts by their ranks, one a request, and knows what it gave."""

    def __init__(self, texts: Sequence[str], ranks: Sequence[int]) -> None:
        self._texts, self._ranks = texts, ranks
        self.count = 0

    def __call__(self) -> list[str]:
        self.count += 1
        return [self._texts[self._ranks[self.count - 1]]]

    @property
    def different(self) -> int:
        """How many different ones it gave."""
        return len(set(self._ranks[: self.count]))


def _loaded(door: Door, callers: int, runs: list[Measured], base: list[Measured]) -> Loaded:
    over = [one.p50_ms - other.p50_ms for one, other in zip(runs, base, strict=True)]
    return Loaded(
        door.key,
        door.title,
        callers,
        Sample.of([one.p50_ms for one in runs]),
        Sample.of([one.p99_ms for one in runs]),
        Sample.of([one.requests_s for one in runs]),
        None if runs is base else Sample.of(over),
    )


async def _timed(
    door: Door, callers: int, make: Callable[[], list[str]], seconds: float
) -> Measured:
    async with _roads(door, callers) as roads:
        gc.collect()
        gc.disable()  # a collection in the middle would be taken for a slow answer
        try:
            return await closed_loop(roads, make, seconds)
        finally:
            gc.enable()


@asynccontextmanager
async def _roads(door: Door, callers: int) -> AsyncIterator[list[Road]]:
    roads = door.roads(callers)
    try:
        yield roads
    finally:
        for road in {id(road): road for road in roads}.values():  # one may be shared
            await road.close()


async def _ms(road: Road, texts: list[str]) -> float:
    began = time.perf_counter()
    await road.embed(texts)
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    main()
