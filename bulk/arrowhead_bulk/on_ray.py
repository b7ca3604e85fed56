# SPDX-License-Identifier: Apache-2.0
"""The units of a job on a Ray cluster: Ray Data maps a pool of actors over their numbers.

What Ray moves are numbers and counts: actors read and write the files themselves. So a unit of an
actor or a node that died is simply done by another one, which replaces what the first left.

Traps, met with Ray 2.60: where actors take every CPU and a node dies, the rest waits for ever
(ray-project/ray#44687), so they ask for a little less than they use, the pool may shrink, and a
job that does nothing for long is ended.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from arrowhead_bulk.errors import BulkError, Stalled
from arrowhead_bulk.job import Job
from arrowhead_bulk.parts import Done
from arrowhead_bulk.work import Task, Worker
from arrowhead_client import ArrowheadError

_CPU_SHARE = 0.95  # of a CPU, that an actor with one thread asks for


@dataclass(frozen=True)
class Cluster:
    """Where, and by how many.

    Attributes:
        address: of a cluster that runs; "" starts one of this machine.
        workers: at most; 0: one for each GPU, or else for each CPU.
        stall_s: ends the job when no unit was done for so long.
    """

    address: str = ""
    workers: int = 0
    stall_s: float = 900.0


class _Actor:
    """One of the pool: `Worker`, in the terms of Ray Data."""

    def __init__(self, task: Task) -> None:
        self._task, self._worker = task, Worker(task)

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        done = [self._worker(self._task.corpus.units[number]) for number in batch["unit"]]
        return {"done": [one.to_json() for one in done]}


def run_on_ray(job: Job, cluster: Cluster, on_done: Callable[[Done], object]) -> dict[str, Any]:
    """Does all units; who did them.

    Raises:
        BulkError: a worker's, or `Stalled`.
        ArrowheadError: an endpoint's.
    """
    with _connected(cluster.address):
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        uses_gpus = not job.task.model.endpoint and job.task.model.device != "cpu"
        gpus = int(resources.get("GPU", 0)) if uses_gpus else 0
        cpus = int(resources.get("CPU", 1))
        workers = min(cluster.workers or gpus or cpus, len(job.units))
        threads = job.task.model.threads or 1
        task = replace(job.task, model=replace(job.task.model, threads=threads))
        data = ray.data.from_items(
            [{"unit": unit.number} for unit in job.units], override_num_blocks=len(job.units)
        ).map_batches(
            _Actor,
            batch_size=1,
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_gpus=1 if gpus else 0,
            num_cpus=threads if threads > 1 else _CPU_SHARE,
        )
        for row in _watched(data, cluster.stall_s):
            on_done(Done.from_json(row["done"]))
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
        return {"engine": "ray", "actors": workers, "nodes": nodes, "gpus": gpus}


@contextmanager
def _connected(address: str) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address or None, log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def _watched(data: ray.data.Dataset, stall_s: float) -> Iterator[dict[str, Any]]:
    """The rows as they come; ends a job that gives none for so long."""
    rows: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def follow() -> None:
        try:
            for row in data.iter_rows():
                rows.put(row)
            rows.put(None)
        except BaseException as error:  # noqa: BLE001 (told by whoever waits)
            rows.put(error)

    threading.Thread(target=follow, name="units", daemon=True).start()
    while True:
        try:
            row = rows.get(timeout=stall_s)
        except queue.Empty:
            raise Stalled(
                f"no part was finished for {stall_s:.0f} s: the cluster has no room for a worker, "
                "or parts take longer (--stall-after). What is done stays: run the same command "
                "again to go on"
            ) from None
        if row is None:
            return
        if isinstance(row, BaseException):
            raise _own(row)
        yield row


def _own(error: BaseException) -> BaseException:
    """Our own error in what Ray wrapped it in."""
    met: BaseException | None = error
    while met is not None:
        if isinstance(met, (BulkError, ArrowheadError)):
            return met
        met = getattr(met, "cause", None) or met.__cause__
    if isinstance(error, RayError):
        return BulkError(f"Ray failed: {' '.join(str(error).split())[-500:]}")
    return error
