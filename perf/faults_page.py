# SPDX-License-Identifier: Apache-2.0
"""What came of each fault, and the page about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf.common import Run
from perf.faults_load import Phase
from perf.faults_overload import Overload

RECOVERY_S = 5.0
GOODPUT = 0.9
_ANSWERS = {"200", "429", "503"}
# Starting, loading and converting is work, here for the cores that answer: what it slows is not
# broken, but it has to end. A server's drain and start take some fifteen seconds of them.
WORK_S = 30.0
WORK = ("rolling_restart", "rolling_gateways", "hot_swap", "full_disk")
# HAProxy asks one other server after what killed the first, so two of three are gone in the same
# moment, and gateways are not ready until they reach the third. Who tries nothing again is told so.
# So is who asked by gRPC a server that stood still: HAProxy does not see Triton's INTERNAL there.
# And who has the beginning of an answer already when a server dies, which HAProxy cannot take back.
_CUT_OFF = ("Triton gRPC: Unavailable: an answer of",)
MAY_REFUSE = {
    "poisoned": (
        "Triton HTTP: Unavailable",
        "Triton gRPC: Unavailable",
        "gateway: Refused: ('HTTP 503'",
    ),
    "pause_server": ("Triton gRPC: Unavailable",),
    "kill_triton": _CUT_OFF,
    "kill_server": _CUT_OFF,
}


@dataclass(frozen=True)
class FaultResult:
    """What callers met from some seconds before a fault until some seconds after it.

    Attributes:
        key, title: its name, and what happened.
        requests, failed, wrong: how many; `wrong` are among those that failed.
        failures: how often what came in the place of an answer.
        before: requests that were answered before the fault.
        since: those that were answered after it began.
        slow: of these, how many took longer than `limit_ms`.
        recovery_s: from the fault to the last request sent that failed or was slow; 0 if there was
            none. Where something is broken several times, the longest. From bad callers' end.
        whole_s: until all parts were ready again, freezing and waiting included.
        facts: what must be so besides, and whether it was.
        notes: what else there is to tell.
    """

    key: str
    title: str
    requests: int
    failed: int
    wrong: int
    failures: dict[str, int]
    before: Phase
    since: Phase
    slow: int
    limit_ms: float
    recovery_s: float
    whole_s: float
    facts: dict[str, bool]
    notes: list[str]

    @property
    def amiss(self) -> int:
        """Requests that failed and should not have."""
        if (allowed := MAY_REFUSE.get(self.key)) is None:
            return self.failed
        return sum(count for what, count in self.failures.items() if not what.startswith(allowed))

    def missed(self) -> list[str]:
        """The goals that were not met."""
        late = self.recovery_s >= (WORK_S if self.key in WORK else RECOVERY_S)
        return [
            *([f"{self.wrong} wrong"] if self.wrong else []),
            *([f"{self.amiss} failed"] if self.amiss else []),
            *([f"recovery {self.recovery_s:.1f} s"] if late else []),
            *(f"not so: {fact}" for fact, is_so in self.facts.items() if not is_so),
        ]


@dataclass(frozen=True)
class FaultResults(Run):
    """One run of `python -m perf.faults`.

    Attributes:
        overload, overload_long: rounds with short texts, and with long ones; none if not asked for.
        left_out: faults that could not be made here, and why.
    """

    faults: list[FaultResult]
    overload: list[Overload]
    overload_long: list[Overload]
    left_out: dict[str, str]


def missed_overload(found: Overload) -> list[str]:
    """The goals of the overload that were not met."""
    others = {status: n for status, n in found.statuses.items() if status not in _ANSWERS}
    return [
        *([f"{found.wrong} wrong"] if found.wrong else []),
        *([f"{found.own_share:.0%} of the peak"] if found.own_share < GOODPUT else []),
        *([f"{found.untold} without Retry-After"] if found.untold else []),
        *([f"other answers: {others}"] if others else []),
        *([f"recovery {found.recovery_s:.1f} s"] if found.recovery_s >= RECOVERY_S else []),
    ]


def told(one: FaultResult) -> str:
    """A fault in a line."""
    return (
        f"{one.requests:,} requests, {one.failed} failed, {one.wrong} wrong; p99 "
        f"{one.before.p99_ms:.0f} ms before, {one.since.p99_ms:.0f} ms since, worst "
        f"{one.since.worst_ms:,.0f} ms; recovery {one.recovery_s:.1f} s, whole after "
        f"{one.whole_s:.0f} s. {_goals(one.missed())}"
    )


def told_overload(found: Overload) -> str:
    """The overload in a line."""
    return (
        f"{found.good_s:,.0f} of {found.peak_s:,.0f} right answers a second "
        f"({found.own_share:.0%} for each core that callers left) at "
        f"{(found.offered - found.unsent) / found.seconds:,.0f} requests a second; "
        f"{found.statuses}; p99 of good "
        f"ones {found.p99_ms:,.0f} ms; recovery {found.recovery_s:.1f} s. "
        f"{_goals(missed_overload(found))}"
    )


def page(results: FaultResults) -> str:
    """The page."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: FaultResults) -> Iterator[str]:
    machine = results.machine
    yield "# Faults"
    yield ""
    yield (
        f"`make faults`, {machine.date}, revision {machine.revision}: {machine.cpu}, "
        f"{machine.cores} cores, {machine.memory_gb:g} GB; three Tritons, two gateways and HAProxy "
        "on it, and all callers."
    )
    yield ""
    if results.quick:
        yield "**A smoke run: its figures mean little.**"
        yield ""
    if results.is_disturbed:
        yield (
            f"**Others used up to {results.other_work.high:.0f} % of the cores meanwhile: times "
            "are too long.**"
        )
        yield ""
    yield (
        "Four callers to the gateways, four to Triton over HTTP and four over gRPC ask without "
        "pause, through HAProxy, and try nothing again. Half of the texts are new to all caches. "
        "Each vector is compared with the right one: *wrong* counts all that are further from it "
        "than a cosine of 0.9999, and answers that mix two versions of the model."
    )
    yield ""
    yield (
        "*Recovery* is the time from the fault to the last request sent that failed or was slow: "
        "more than half a second, or three times the 99th percentile of before, if that is more; "
        "with bad callers, the time since they were gone. "
        "*Whole* is when every part was ready again. Goals: none wrong, none failed, recovery "
        f"below {RECOVERY_S:.0f} s, for {', '.join(WORK)} below {WORK_S:.0f} s after each step: "
        "there servers start, load and convert on the cores that answer. For a "
        "moment requests may be refused with 503 where two of three Tritons are gone at once "
        "(`poisoned`), and, by gRPC to Triton, with its INTERNAL where a server stood still "
        "(`pause_server`); and an answer by gRPC may break off that had begun when its server was "
        "killed (`kill_triton`, `kill_server`)."
    )
    yield ""
    yield (
        "| fault | requests | failed | wrong | p50 / p99 ms before | since | worst ms | slow "
        "| right answers/s before, since | recovery s | whole s | goals |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for one in results.faults:
        yield (
            f"| `{one.key}`: {one.title} | {one.requests:,} | {one.failed} | {one.wrong} "
            f"| {one.before.p50_ms:.0f} / {one.before.p99_ms:.0f} "
            f"| {one.since.p50_ms:.0f} / {one.since.p99_ms:.0f} | {one.since.worst_ms:,.0f} "
            f"| {one.slow} | {one.before.rate:.0f}, {one.since.rate:.0f} "
            f"| {one.recovery_s:.1f} | {one.whole_s:.1f} | {_goals(one.missed())} |"
        )
    yield ""
    for name, why in results.left_out.items():
        yield f"`{name}` was left out: {why}."
        yield ""
    yield from _told_besides(results)
    if results.overload:
        yield from _overload_lines(results.overload, "short texts")
    if results.overload_long:
        yield from _overload_lines(results.overload_long, "long texts")


def _told_besides(results: FaultResults) -> Iterator[str]:
    for one in results.faults:
        told = [
            *one.notes,
            *(f"{fact}: {'yes' if is_so else 'NO'}" for fact, is_so in one.facts.items()),
            *(f"{count} x {what}" for what, count in one.failures.items()),
        ]
        if told:
            yield f"`{one.key}`:"
            yield ""
            yield from (f"- {' '.join(line.split())}" for line in told)
            yield ""


def _overload_lines(rounds: Sequence[Overload], what: str) -> Iterator[str]:
    by_share = sorted(rounds, key=lambda one: one.own_share)
    found = by_share[len(rounds) // 2]
    yield f"## Ten times too many requests: {what}"
    yield ""
    sent_s = (found.offered - found.unsent) / found.seconds
    yield (
        f"For {found.seconds:.0f} s {found.offered / found.seconds:,.0f} requests a second of a "
        "new text each were due, ten times what the gateways answer at their peak, whether answers "
        f"came or not; {sent_s:,.0f} a second were sent, for the others ({found.unsent:,} of "
        f"{found.offered:,}) all connections were taken. Goals: at least {GOODPUT:.0%} of the "
        "peak's right answers for each core that the callers, who are on this machine, leave; 429 "
        "or 503 with Retry-After for all others."
    )
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| right answers a second, at the peak | {found.peak_s:,.0f} |"
    yield f"| right answers a second, overloaded | {found.good_s:,.0f} ({found.share:.0%}) |"
    at_peak, overloaded = found.callers_cores
    yield (
        f"| cores that the callers took themselves, of {found.cores}, at the peak and overloaded | "
        f"{at_peak:.2f}, {overloaded:.2f} |"
    )
    yield f"| right answers for each core that they left, to the peak's | {found.own_share:.0%} |"
    shares = ", ".join(f"{one.own_share:.0%}" for one in rounds)
    yield f"| the same of all rounds, of which this is the median | {shares} |"
    statuses = ", ".join(f"{status}: {count:,}" for status, count in found.statuses.items())
    yield f"| answers by status | {statuses} |"
    yield f"| wrong vectors | {found.wrong} |"
    yield f"| refused without Retry-After | {found.untold} |"
    yield (
        f"| p50 / p99 / worst of good answers, ms | {found.p50_ms:,.0f} / {found.p99_ms:,.0f} / "
        f"{found.worst_ms:,.0f} |"
    )
    yield f"| p99 of refusals, ms | {found.refused_p99_ms:,.0f} |"
    yield f"| recovery, s | {found.recovery_s:.1f} |"
    before, most = found.memory_mb
    yield f"| memory of gateways and HAProxy, MB, before and at most | {before:,.0f}, {most:,.0f} |"
    yield f"| goals | {_goals(missed_overload(found))} |"
    yield ""


def _goals(missed: list[str]) -> str:
    return f"missed: {'; '.join(missed)}" if missed else "met"
