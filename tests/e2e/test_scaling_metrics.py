# SPDX-License-Identifier: Apache-2.0
"""What deploy/kubernetes scales on does tell that there are too few servers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from arrowhead_server.supervisor import Server
from perf.profile_load import Stream, infer_request, run
from perf.profile_stats import parse_metrics

from . import gateways

SCALED = Path(__file__).parents[2] / "deploy/kubernetes/components/autoscaling/scaledobjects.yaml"
PENDING, UNDER_WAY = "nv_inference_pending_request_count", "arrowhead_gateway_in_flight"
CALLERS = 48
LONG = "of a length that takes the encoder far longer than its caller " * 15


@pytest.fixture(scope="module")
def triggers() -> dict[str, dict[str, Any]]:
    scaled = {
        one["metadata"]["name"]: one["spec"]["triggers"]
        for one in yaml.safe_load_all(SCALED.read_text(encoding="utf-8"))
    }
    found = {trigger["name"]: trigger["metadata"] for trigger in scaled["triton"]}
    assert scaled["gateway"][0]["metadata"]["query"] == found["under-way"]["query"]
    return found


@contextmanager
def load(embed: Callable[[str], Any]) -> Iterator[None]:
    """Many callers, each with a new text as soon as its last one is answered."""
    numbers, over, failed = itertools.count(), threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            try:
                embed(f"text {next(numbers)} " + LONG)
            except Exception as error:  # noqa: BLE001 (told below)
                failed.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failed == []


def seen(url: str, name: str, model: str, seconds: float = 2.0) -> list[float]:
    """A gauge, as it is scraped meanwhile."""
    values, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        values.append(parse_metrics(httpx.get(url).text)[name, model])
        time.sleep(0.05)
    return values


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_requests_wait_for_the_encoder_and_not_for_the_ensemble(
    server: Server, triggers: dict[str, dict[str, Any]]
) -> None:
    threshold = float(triggers["pending"]["threshold"])
    url = server.metrics_url
    assert mean(seen(url, PENDING, "minilm_encoder", 0.5)) < 1
    # More than a step takes (100): what is in it does not wait any more.
    requests = [infer_request([f"text {number} {LONG}"]) for number in range(2000)]
    stream = Stream(server.address, requests, clients=200, seconds=4.0)
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(run, stream)
        time.sleep(1.0)
        encoder = seen(url, PENDING, "minilm_encoder")
        ensemble = seen(url, PENDING, "minilm", 0.5)
        assert len(sent.result()[0].ms) >= 200
    assert mean(encoder) > threshold
    assert mean(ensemble) < 1


def test_what_waits_behind_a_gateway_waits_there(
    server: Server, triggers: dict[str, dict[str, Any]]
) -> None:
    process, url = gateways.started("--url", server.grpc_url)
    try:
        with httpx.Client(limits=httpx.Limits(max_connections=CALLERS)) as asking:

            def embed(text: str) -> None:
                asking.post(f"{url}/embed", json={"inputs": text}).raise_for_status()

            with load(embed):
                time.sleep(0.3)
                under_way = mean(seen(f"{url}/metrics", UNDER_WAY, ""))
                pending = max(seen(server.metrics_url, PENDING, "minilm_encoder", 1.0))
        assert under_way > float(triggers["under-way"]["threshold"])
        assert pending <= 5  # whatever comes, so that alone would never ask for more servers
    finally:
        gateways.stopped(process)


def test_the_queries_add_up_what_they_should(
    triggers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert not os.environ.get("CI"), "scripts/test-packages installs prometheus"
        pytest.skip("no promtool: scripts/test-packages installs prometheus")
    where = 'namespace="arrowhead"'
    series = {
        f'{PENDING}{{{where}, pod="a", model="minilm_encoder"}}': "7 4 6 8 10",
        f'{PENDING}{{{where}, pod="b", model="other_encoder"}}': "1 1 1 1 1",
        f'{PENDING}{{{where}, pod="b", model="other_tokenizer"}}': "100x4",
        f'{PENDING}{{{where}, pod="b", model="other"}}': "100x4",
        f'{PENDING}{{namespace="elsewhere", pod="c", model="minilm_encoder"}}': "100x4",
        f'{UNDER_WAY}{{{where}, pod="d"}}': "20x4",
        f'{UNDER_WAY}{{{where}, pod="e"}}': "30x4",
        f'{UNDER_WAY}{{namespace="elsewhere", pod="f"}}': "100x4",
    }
    # The mean of the last minute, with its first moment (Prometheus 2) or without: 7, and 1.
    wanted = {"pending": 8.0, "under-way": 50.0}
    assert set(wanted) == set(triggers)
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": name, "values": values} for name, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": trigger["query"],
                        "eval_time": "1m",
                        "exp_samples": [{"labels": "{}", "value": wanted[name]}],
                    }
                    for name, trigger in triggers.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test), encoding="utf-8")
    command = [promtool, "test", "rules", str(tmp_path / "test.yml")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
