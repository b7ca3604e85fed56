# SPDX-License-Identifier: Apache-2.0
"""A gateway that is asked to stop: balancers hear of it before it does."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter

import httpx
import pytest

from arrowhead_server.supervisor import Server

from .conftest import wait_until
from .gateways import started


def test_it_answers_on_while_it_drains_and_nothing_fails(server: Server) -> None:
    process, url = started(f"--url={server.grpc_url}", "--drain=2")
    counts: Counter[str] = Counter()
    may_connect = threading.Event()
    may_connect.set()

    def ask(caller: int) -> None:
        while may_connect.is_set():
            try:
                inputs = f"{caller} {counts.total()}"
                status = httpx.post(f"{url}/embed", json={"inputs": inputs}, timeout=10).status_code
            except httpx.TransportError as error:
                counts[repr(error)] += 1
            else:
                counts[str(status)] += 1

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    try:
        wait_until(lambda: counts["200"] > 20, "the load to flow")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503, "the drain")
        assert "asked to stop" in httpx.get(f"{url}/ready").json()["error"]
        before = counts["200"]
        time.sleep(1)
        assert counts["200"] > before + 20
    finally:
        may_connect.clear()  # as a balancer does that has seen it unready
        for caller in callers:
            caller.join()
        try:
            process.wait(10)
        finally:
            process.kill()
    assert set(counts) == {"200"}
    assert process.returncode == -signal.SIGTERM
    assert 2 <= time.monotonic() - began < 6


@pytest.mark.parametrize("options", [(), ("--drain=60",)])
def test_at_once_without_and_with_a_second_signal(server: Server, options: tuple[str, ...]) -> None:
    process, url = started(f"--url={server.grpc_url}", *options)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if options:
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503, "the drain")
        process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert time.monotonic() - began < 5
