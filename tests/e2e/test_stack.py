# SPDX-License-Identifier: Apache-2.0
"""The stack: the configuration files of deploy/, run as plain processes."""

from __future__ import annotations

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from arrowhead_client import Client
from deploy.stack import Stack

from .conftest import wait_until


@pytest.mark.parametrize("road", ["grpc_url", "http_url"])
def test_through_haproxy_come_the_vectors_of_the_engine(
    stack: Stack, road: str, texts: list[str], wanted: npt.NDArray[np.float32]
) -> None:
    with Client(getattr(stack, road)) as client:
        got = client.embed(texts)
    assert (got * wanted).sum(axis=1).min() > 0.9999


def test_the_gateways_answer_through_haproxy(
    stack: Stack, texts: list[str], wanted: npt.NDArray[np.float32]
) -> None:
    answer = httpx.post(f"{stack.gateway_url}/embed", json={"inputs": texts, "truncate": True})
    assert answer.status_code == 200, answer.text
    assert (np.array(answer.json()) * wanted).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("road", ["grpc_url", "http_url"])
def test_requests_go_to_all_replicas(stack: Stack, road: str) -> None:
    before = {name: _requests(stack, name) for name in stack.tritons}
    with Client(getattr(stack, road), batch_size=1) as client:
        client.embed([f"{road} number {number}" for number in range(60)])
    for name in stack.tritons:
        assert _requests(stack, name) - before[name] >= 10


def test_prometheus_reaches_everything(stack: Stack) -> None:
    def up() -> dict[str, int]:
        answer = httpx.get(f"{stack.prometheus_url}/api/v1/query", params={"query": "up == 1"})
        jobs = [series["metric"]["job"] for series in answer.json()["data"]["result"]]
        return {job: jobs.count(job) for job in sorted(set(jobs))}

    wait_until(
        lambda: up() == {"gateway": 2, "haproxy": 1, "server": 3, "triton": 3}, "all targets", 20
    )


def _requests(stack: Stack, name: str) -> float:
    metrics = httpx.get(f"http://{stack.address(name)}:8002/metrics").text
    for line in metrics.splitlines():
        if line.startswith('nv_inference_request_success{model="minilm",'):
            return float(line.rpartition(" ")[2])
    raise AssertionError(metrics)
