# SPDX-License-Identifier: Apache-2.0
"""The units of a job on a Ray cluster: Ray Data maps a pool of actors over their numbers.

What Ray moves are numbers and counts: actors read and write the files themselves. So a unit of an
actor or a node that died is simply done by another one, which replaces what the first left.

Traps, met with Ray 2.60: where actors take every CPU and a node dies, the rest waits for ever
(ray-project/ray#44687), so they ask for a little less than they use, the pool may shrink, and a
job that does nothing for long is ended. A call of Ray's after `ray.shutdown` starts a new cluster,
unless it is told not to.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # read when ray is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ctypes
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arrowhead_bulk.errors import BulkError, Incomplete, Stalled
from arrowhead_bulk.job import Job
from arrowhead_bulk.parts import Done
from arrowhead_bulk.progress import Progress
from arrowhead_bulk.vectors import Model
from arrowhead_bulk.work import Task, Worker
from arrowhead_client import ArrowheadError

_LESS_CPU = 0.05  # than an actor has threads
_LOOK_S = 1.0
_END_S = 30.0
_Told = Done | BaseException | None


@dataclass(frozen=True)
class Cluster:
    """Where, and by how many.

    Attributes:
        address: of a cluster that runs; "" starts one of this machine.
        workers: at most; 0: one for each GPU, or else for each CPU.
        stall_s: ends the job when no row was done for so long.
    """

    address: str = ""
    workers: int = 0
    stall_s: float = 600.0


class Pool(NamedTuple):
    """How many actors, and what each of them gets.

    Attributes:
        workers: at most.
        threads: of each; with a GPU they are its tokenizer's only.
        cpus, gpus: that Ray keeps for each.
        all_gpus: that the cluster has for them.
    """

    workers: int
    threads: int
    cpus: float
    gpus: int
    all_gpus: int

    @classmethod
    def of(
        cls, nodes: Sequence[Mapping[str, float]], model: Model, wanted: int, units: int
    ) -> Pool:
        """For this model and so many units, of what the nodes have.

        Raises:
            BulkError: the device is a GPU's number.
        """
        if model.endpoint or model.device == "cpu":
            found = []
        else:
            found = [(node.get("CPU", 0.0), node["GPU"]) for node in nodes if node.get("GPU")]
        if not found and not model.device.startswith("cuda"):
            threads = model.threads or 1
            cpus = int(sum(node.get("CPU", 0.0) for node in nodes))
            workers = wanted or max(1, cpus // threads)
            return cls(min(workers, units), threads, threads - _LESS_CPU, 0, 0)
        if ":" in model.device:
            raise BulkError(
                f"--device {model.device}: on Ray each worker gets a GPU of its own; wanted cuda, "
                "or --no-ray"
            )
        # Cores are for tokenizers only; where there are fewer of them than GPUs, workers share one.
        share = min((cpus / gpus for cpus, gpus in found), default=1.0)
        all_gpus = int(sum(gpus for _, gpus in found))
        threads = model.threads or max(1, int(share))
        workers = min(wanted or max(1, all_gpus), units)
        return cls(workers, threads, max(0.0, min(1.0, share) - _LESS_CPU), 1, all_gpus)


class _Ledger:
    """Where actors tell what they have done of units that are not finished."""

    def __init__(self) -> None:
        self._rows = self._tokens = 0

    def add(self, rows: int, tokens: int) -> None:
        self._rows += rows
        self._tokens += tokens

    def taken(self) -> tuple[int, int]:
        """What came since it was asked last."""
        taken = self._rows, self._tokens
        self._rows = self._tokens = 0
        return taken


class _Actor:
    """One of the pool: `Worker`, in the terms of Ray Data."""

    def __init__(self, task: Task, ledger: Any) -> None:
        # The tokenizer's own threads; read when it is first used.
        os.environ["RAYON_NUM_THREADS"] = str(task.model.threads)
        self._task = task
        self._worker = Worker(task, lambda rows, tokens: ledger.add.remote(rows, tokens))

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        (number,) = batch["unit"]
        try:
            done = self._worker(self._task.corpus.units[number])
        except (BulkError, ArrowheadError) as error:  # Ray would wrap it beyond recognition
            return {"done": [""], "error": [str(error)]}
        return {"done": [done.to_json()], "error": [""]}


def run_on_ray(job: Job, cluster: Cluster, progress: Progress) -> dict[str, Any]:
    """Does all units; who did them.

    Raises:
        BulkError: a worker's, or `Stalled`.
    """
    with _connected(cluster.address):
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        model = job.task.model
        resources = [node["Resources"] for node in alive]
        pool = Pool.of(resources, model, cluster.workers, len(job.units))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        ledger = ray.remote(_Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
        data = ray.data.from_items(
            [{"unit": unit.number} for unit in job.units], override_num_blocks=len(job.units)
        ).map_batches(
            _Actor,
            batch_size=1,
            fn_constructor_args=(
                replace(job.task, model=replace(model, threads=pool.threads, shared=True)),
                ledger,
            ),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool.workers),
            num_gpus=pool.gpus,
            num_cpus=pool.cpus,
        )
        is_first = True
        with _followed(data) as found:
            for done in _watched(found, ledger, cluster.stall_s, progress):
                if is_first and not job.has(done):
                    raise Incomplete(
                        f"a worker wrote {done.number} where this process does not see it: the "
                        "folder of the vectors must be the same on all machines"
                    )
                is_first = False
                progress.done(done)
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
        return {
            "engine": "ray",
            "actors_at_most": pool.workers,
            "nodes": nodes,
            "gpus": pool.all_gpus,
        }


@contextmanager
def _connected(address: str) -> Iterator[None]:
    # Ray prints on stdout who has died; that is where the report goes.
    with redirect_stdout(sys.stderr):
        ray.init(address=address or "local", log_to_driver=False, include_dashboard=False)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield
        finally:
            ray.shutdown()


@contextmanager
def _followed(data: ray.data.Dataset) -> Iterator[queue.Queue[_Told]]:
    """What comes of it, as it comes; in the end nothing of it runs in this process."""
    found: queue.Queue[_Told] = queue.Queue()
    is_over = threading.Event()

    def follow() -> None:
        try:
            # Blocks as they come: looked ahead, one would be told when the next is there.
            for block in data.iter_batches(batch_size=None, prefetch_batches=0):
                for done, error in zip(block["done"], block["error"], strict=True):
                    found.put(BulkError(error) if error else Done.from_json(done))
                if is_over.is_set():
                    return
            found.put(None)
        except BaseException as error:  # noqa: BLE001 (told by whoever waits)
            found.put(error)

    following = threading.Thread(target=follow, name="units", daemon=True)
    following.start()
    try:
        yield found
    finally:
        # A thread that asks Ray for something while it is shut down ends the process at once.
        is_over.set()
        following.join(_LOOK_S)
        if following.is_alive():
            # It waits for a block, 10 ms at a time, and Ray tidies up after any exception there;
            # there is no other way to tell it before the first block is there.
            ident = ctypes.c_ulong(following.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
            following.join(_END_S)


def _watched(
    found: queue.Queue[_Told], ledger: Any, stall_s: float, progress: Progress
) -> Iterator[Done]:
    """The units as they come; ends a job that does not get on for so long."""
    alive_at = time.monotonic()
    while True:
        try:
            one = found.get(timeout=_LOOK_S)
        except queue.Empty:
            rows, tokens = ray.get(ledger.taken.remote())
            if rows:
                progress.rows(rows, tokens)
                alive_at = time.monotonic()
            elif time.monotonic() - alive_at > stall_s:
                raise Stalled(
                    f"no row was embedded for {stall_s:.0f} s: the cluster has no room for a "
                    "worker, or a machine is too slow for --stall-after. What is done stays: run "
                    "the same command again to go on"
                ) from None
            continue
        alive_at = time.monotonic()
        if one is None:
            return
        if isinstance(one, RayError):
            raise BulkError(f"Ray failed: {' '.join(str(one).split())[-500:]}") from one
        if isinstance(one, BaseException):
            raise one
        yield one
