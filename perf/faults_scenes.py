# SPDX-License-Identifier: Apache-2.0
"""What is broken, and how: each function here does it to a stack under load.

Each returns once the stack is whole again, and leaves it as it was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from deploy.stack import Stack
from perf.faults_clients import dawdle, leave, poisoned_over_grpc, poisoned_over_http
from perf.faults_load import Load
from perf.server import MODEL

ARROWHEAD = str(Path(sys.executable).with_name("arrowhead"))
_PAUSE_S = 1.2  # Triton takes for dead what showed no life for a second
_WHOLE_S = 90.0  # until then everything must be up again
_STUB = "triton_python_backend_stub"


@dataclass
class Scene:
    """Where a fault happens.

    Attributes:
        stack, load: under which it happens.
        repository: that the stack serves.
        versions: of the model, the live one and another.
        frozen_s: how long what is frozen stays so.
        slow_s: for how long slow callers try.
        callers: bad ones, of each kind.
        notes: what else there is to tell of it, a sentence each.
        facts: what must be so besides, and whether it was.
        steps: when something was broken, on the monotonic clock.
        gone_at: when bad callers were gone; 0 if there were none.
    """

    stack: Stack
    load: Load
    repository: Path
    versions: tuple[int, int]
    frozen_s: float
    slow_s: float
    callers: int
    notes: list[str] = field(default_factory=list)
    facts: dict[str, bool] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    gone_at: float = 0.0

    def step(self) -> None:
        """From now on something is broken."""
        self.steps.append(time.monotonic())

    def whole(self, *names: str) -> None:
        """Waits until these parts are ready again, and HAProxy sends requests to all."""

        def is_whole() -> bool:
            return all(map(self.stack.is_ready, (*names, "haproxy")))

        self.load.wait_until(is_whole, _WHOLE_S, f"{', '.join(names)} and HAProxy to be ready")

    def left(self, name: str) -> None:
        """Waits until HAProxy knows that a Triton is gone."""

        def is_out() -> bool:
            return self.stack.servers_up().get("triton_grpc") == self.stack.replicas - 1

        self.load.wait_until(is_out, 30.0, f"HAProxy to take {name} out")


def kill_triton(scene: Scene) -> None:
    """The process of one Triton dies; its supervisor starts it anew."""
    process = triton(scene.stack, "triton1")
    scene.step()
    process.kill()
    scene.left("triton1")
    scene.whole("triton1")


def kill_server(scene: Scene) -> None:
    """A whole `arrowhead serve` dies; Docker, here supervisord, starts it anew."""
    scene.step()
    scene.stack.kill("triton1")
    scene.left("triton1")
    scene.whole("triton1")


def kill_encoder(scene: Scene) -> None:
    """The process of the encoder of one Triton dies."""
    _kill_model(scene, "triton2", f"{MODEL}_encoder")


def kill_tokenizer(scene: Scene) -> None:
    """The process of the tokenizer of one Triton dies."""
    _kill_model(scene, "triton3", f"{MODEL}_tokenizer")


def _kill_model(scene: Scene, name: str, model: str) -> None:
    process = stub(scene.stack, name, model)
    scene.step()
    process.kill()
    scene.left(name)
    scene.whole(name)


def freeze_triton(scene: Scene) -> None:
    """One Triton stands still (SIGSTOP), and goes on where it stood."""
    frozen(scene, [triton(scene.stack, "triton1")], scene.frozen_s)
    scene.whole("triton1")


def hang_triton(scene: Scene) -> None:
    """One Triton stands still for ever; its supervisor starts it anew."""
    process = triton(scene.stack, "triton3")
    scene.step()
    process.suspend()
    scene.load.wait_until(lambda: not process.is_running(), _WHOLE_S, "the supervisor to act")
    scene.notes.append(f"the supervisor ended it after {time.monotonic() - scene.steps[0]:.0f} s")
    scene.whole("triton3")


def freeze_gateway(scene: Scene) -> None:
    """One gateway stands still, and goes on where it stood."""
    frozen(scene, [psutil.Process(scene.stack.pid("gateway1"))], scene.frozen_s)
    scene.whole("gateway1")


def freeze_server(scene: Scene) -> None:
    """One `arrowhead serve` stands still with all below it, and goes on where it stood."""
    server = psutil.Process(scene.stack.pid("triton2"))
    frozen(scene, [server, *server.children(recursive=True)], scene.frozen_s)
    scene.whole("triton2")


def frozen(
    scene: Scene, processes: list[psutil.Process], seconds: float, *, is_last_first: bool = True
) -> None:
    """Has processes stand still for a while, under load."""
    scene.step()
    with standing_still(processes, is_last_first=is_last_first):
        scene.load.wait(seconds)


@contextmanager
def standing_still(
    processes: Sequence[psutil.Process], *, is_last_first: bool = True
) -> Iterator[None]:
    """Processes stand still meanwhile.

    They go on last first, as they depend on each other: a Triton that goes on a moment before its
    models' processes answers what it held with INTERNAL, which HAProxy does not see in gRPC.
    """
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in reversed(processes) if is_last_first else processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def pause_server(scene: Scene) -> None:
    """One `arrowhead serve`, all below it included, stands still for a second, five times."""
    for _ in range(5):
        server = psutil.Process(scene.stack.pid("triton3"))
        # Triton goes on first, and takes its models' processes for dead, while they go on.
        frozen(scene, [server, *server.children(recursive=True)], _PAUSE_S, is_last_first=False)
        scene.load.wait(_PAUSE_S)  # by now it is seen, if one ended
        scene.whole("triton3")


def rolling_restart(scene: Scene) -> None:
    """All Tritons are restarted, one after the other, each with its drain."""
    for name in scene.stack.tritons:
        scene.step()
        scene.stack.restart(name)
        scene.whole(name)


def rolling_gateways(scene: Scene) -> None:
    """All gateways are restarted, one after the other, each with its drain."""
    for name in gateways(scene.stack):
        scene.step()
        scene.stack.restart(name)
        scene.whole(name)


def kill_gateway(scene: Scene) -> None:
    """One gateway dies."""
    scene.step()
    scene.stack.kill("gateway1")
    scene.whole("gateway1")


def reload_haproxy(scene: Scene) -> None:
    """HAProxy reads its configuration anew, three times."""
    for _ in range(3):
        scene.step()
        scene.stack.reload_haproxy()
        scene.load.wait(1.0)
        scene.whole()


def hot_swap(scene: Scene) -> None:
    """Version 2 of the model goes live on all replicas, and then version 1 again."""
    old, new = scene.versions
    for command, version in ((["promote", MODEL, str(new)], new), (["rollback", MODEL], old)):
        began = time.monotonic()
        scene.step()
        arrowhead(*command, "--repository", str(scene.repository))
        scene.load.wait_until(
            lambda version=version: is_all(scene, version),  # type: ignore[misc]
            60.0,
            f"answers of version {version} only",
        )
        scene.notes.append(
            f"{command[0]}: both versions answered for {_overlap_s(scene.load, began, version):.1f}"
            f" s, {_overlap_s(scene.load, began, version, 'gateway'):.1f} s by the gateways"
        )


def leaving_callers(scene: Scene) -> None:
    """Callers go away in the middle of a request."""
    scene.step()
    left = leave(scene.stack, scene.load.known, scene.callers)
    scene.gone_at = time.monotonic()
    told = ", ".join(f"{count} {when}" for when, count in left.items())
    scene.notes.append(f"{sum(left.values())} went away: {told}")
    scene.facts["they went away"] = sum(left.values()) >= 6 * scene.callers
    scene.whole()


def slow_callers(scene: Scene) -> None:
    """Callers send heads and bodies byte by byte, or read no answer."""
    seconds = scene.slow_s
    scene.step()
    for kind, (ended, last_s) in dawdle(
        scene.stack, scene.load.known, scene.callers, seconds
    ).items():
        last = f", the last after {last_s:.1f} s" if ended else ""
        scene.notes.append(f"{kind}: {ended} of {scene.callers} were hung up on{last}")
    scene.gone_at = time.monotonic()
    scene.whole()


def poisoned(scene: Scene) -> None:
    """A request that ends a model's process in Triton 2.51 comes over gRPC, then over HTTP."""
    for road, send in (("gRPC", poisoned_over_grpc), ("HTTP", poisoned_over_http)):
        before = restarts(scene.stack)
        scene.step()
        answer = send(scene.stack)
        scene.load.wait_until(
            lambda before=before: restarts(scene.stack) != before,  # type: ignore[misc]
            _WHOLE_S,
            "a Triton to be started anew",
        )
        scene.whole(*scene.stack.tritons)
        hit = {name: count - before[name] for name, count in restarts(scene.stack).items()}
        # HAProxy asks one other server, and no third one.
        scene.facts[f"over {road} two Tritons at most were hit"] = (
            sum(map(bool, hit.values())) <= 2 >= max(hit.values())
        )
        scene.facts[f"over {road} it was answered with an error"] = answer not in ("OK", "200")
        told = ", ".join(f"{name} {count:g}" for name, count in hit.items() if count)
        scene.notes.append(f"over {road}: {answer}; started anew: {told}")


def restarts(stack: Stack) -> dict[str, float]:
    """How often each Triton was started anew."""
    found = {}
    for name in stack.tritons:
        metrics = httpx.get(f"http://{stack.address(name)}:8003/metrics").text
        (found[name],) = (
            sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "arrowhead_server_restarts_total"
        )
    return found


def is_all(scene: Scene, version: int) -> bool:
    """Whether by every way the last answers all were of this version."""
    last: dict[str, list[int]] = {}
    for one in reversed(scene.load.done[-600:]):
        last.setdefault(one.road, []).append(one.version)
    return len(last) == 3 and all(
        len(met) >= 60 and set(met[:60]) == {version} for met in last.values()
    )


def _overlap_s(load: Load, began: float, version: int, road: str = "") -> float:
    """From the first answer of this version to the last request answered with another."""
    sent = [one for one in load.done if one.at > began and one.road.startswith(road)]
    first = min(one.at + one.took for one in sent if one.version == version)
    return max([one.at for one in sent if one.version != version], default=first) - first


def triton(stack: Stack, name: str) -> psutil.Process:
    """The tritonserver of a part."""
    return _below(stack, name, lambda process: process.name() == "tritonserver")


def stub(stack: Stack, name: str, model: str) -> psutil.Process:
    """The process of a model of a part."""
    return _below(
        stack,
        name,
        lambda process: (
            Path(process.exe()).name == _STUB and f"/{model}/" in " ".join(process.cmdline())
        ),
    )


def gateways(stack: Stack) -> list[str]:
    """Their names."""
    return [name for name in stack.names if name.startswith("gateway")]


def _below(stack: Stack, name: str, condition: Callable[[psutil.Process], bool]) -> psutil.Process:
    for process in psutil.Process(stack.pid(name)).children(recursive=True):
        if condition(process):
            return process
    raise LookupError(f"{name} has no such process")


def arrowhead(*arguments: str) -> str:
    """Runs the command; what it printed."""
    run = subprocess.run([ARROWHEAD, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"arrowhead {' '.join(arguments)}: {run.stderr.strip()}")
    return run.stdout
