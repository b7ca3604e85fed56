# SPDX-License-Identifier: Apache-2.0
"""The peers' environments, processes, results, page and plots, without building a peer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from perf.common import last_line
from perf.copies import with_dtype
from perf.machine import Machine
from perf.peers import environments, inprocess, plots, report, servers
from perf.peers.environments import PeerUnavailable, build, fingerprint
from perf.peers.generator import Measured, loads
from perf.peers.inprocess import Engine
from perf.peers.results import InProcess, PeerResults
from perf.peers.servers import Door, Running, first_answer
from perf.peers.session import Seen
from perf.quality import Closeness
from perf.stats import Sample

FAMILIES = ("torch", "infinity", "onnxruntime", "openvino")


@pytest.mark.parametrize("family", FAMILIES)
def test_pins_are_exact_and_name_no_address(family: str):
    lines = (environments.PINS / f"{family}.txt").read_text().splitlines()[1:]
    assert [line for line in lines if "==" not in line or "://" in line or "@" in line] == []
    assert [line for line in lines if line.startswith(("nvidia-", "--"))] == []


def test_a_built_environment_is_used_again_until_its_pins_change(tmp_path: Path):
    pins = (environments.PINS / "torch.txt").read_text(encoding="utf-8")
    (tmp_path / "torch").mkdir()
    stamp = tmp_path / "torch" / ".built"
    stamp.write_text(fingerprint(pins, sys.version))
    assert build("torch", tmp_path) == tmp_path / "torch" / "bin" / "python"
    assert fingerprint(pins + "x", sys.version) != stamp.read_text()


def test_a_command_that_fails_says_why():
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(PeerUnavailable, match="what: no such thing"):
        environments.run(command, "what")
    with pytest.raises(PeerUnavailable, match="what: "):
        environments.run(["/no/such/program"], "what")


def test_the_last_line_is_one_that_says_something():
    assert last_line("a\n b \n\n") == "b"
    assert last_line("") == ""


@pytest.mark.parametrize("fused", [False, True])
def test_a_repository_is_copied_to_be_served_otherwise(
    minilm_repository: Path, tmp_path: Path, fused: bool
):
    before = {p: p.read_text() for p in minilm_repository.glob("*/config.pbtxt")}
    copy = with_dtype(minilm_repository, tmp_path, "int8", fused=fused)
    encoder = (copy / "minilm_encoder" / "config.pbtxt").read_text()
    assert 'key: "compute_dtype" value { string_value: "int8" }' in encoder
    steps = (copy / "minilm" / "config.pbtxt").read_text().count("model_name")
    assert steps == (1 if fused else 2)
    assert {p: p.read_text() for p in minilm_repository.glob("*/config.pbtxt")} == before


def test_what_was_started_is_stopped_with_all_below_it():
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    servers.stop(process)
    process.stdout.close()
    assert process.returncode is not None
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break  # ended; whoever inherited it has not looked yet
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_server_that_ends_while_starting_says_why():
    port = servers.free_port()
    door = Door("x", "x", lambda: servers.FastApiRoad(port))
    ended = Running(time.perf_counter(), [door], os.getpid(), lambda: False, lambda: "out of luck")
    with pytest.raises(PeerUnavailable, match="out of luck"):
        asyncio.run(first_answer(ended))


def test_shared_doors_give_all_clients_the_same_road():
    made = Door("x", "x", lambda: servers.FastApiRoad(1)).roads(3)
    assert len(set(map(id, made))) == 3
    shared = Door("x", "x", lambda: servers.FastApiRoad(1), shared=True).roads(3)
    assert len(set(map(id, shared))) == 1


def test_an_engine_is_timed_in_a_process_of_its_own(minilm_repository: Path):
    repository = str(minilm_repository)
    own = Engine("us", "us", Path(sys.executable), ("arrowhead", "float32", repository))
    bad = Engine("bad", "bad", Path(sys.executable), ("arrowhead", "float1", repository))
    missing: dict[str, str] = {}
    found = inprocess.measure([own, bad], rounds=1, slice_ms=0.0, limit_s=0.0, missing=missing)
    assert [one.key for one in found] == ["us"], missing
    assert set(found[0].ms) == {inprocess.name(shape) for shape in inprocess.SHAPES}
    assert list(missing) == ["bad in process"]
    assert "float1" in missing["bad in process"]
    with inprocess.running(own) as worker:
        assert worker.embed(["a", "b"]).shape == (2, 384)


def results(**changes: object) -> PeerResults:
    """Two servers, the second twice as fast, and no more than the page needs."""
    vectors = np.eye(2, 4, dtype=np.float32)

    def seen(kind: str, ms: float) -> Seen:
        measured = {
            load.key: [Measured(ms, 2 * ms, 1000 / ms, 9), Measured(ms, 2 * ms, 1000 / ms, 9)]
            for load in loads((1, 8))
        }
        return Seen(f"{kind}, gRPC", kind, [1.0, 2.0], [100.0], measured, vectors, 82.0)

    chosen = loads((1, 8))
    values: dict[str, object] = {
        "machine": Machine("cpu", 2, (), 1.0, "6", "3", {}, 0.0, "abc", "2026-01-01"),
        "quick": False,
        "seconds": 1.0,
        "passes": 2,
        "load_s": 1.0,
        "other_work": Sample.of([1.0]),
        "against": "arrowhead-float32",
        "servers": [
            seen("arrowhead-float32", 4.0).result("arrowhead-float32", chosen, vectors),
            seen("other", 2.0).result("other", chosen, vectors),
        ],
        "in_process": [InProcess("arrowhead-float32", "us", {"1 x 16": Sample.of([3.0])})],
        "notes": {"other": "is fast"},
        "versions": {"torch": {"torch": "2"}},
        "missing": {"a third": "no network"},
        "sts_pairs": 3,
        "engine": None,
    }
    return PeerResults(**{**values, **changes})  # type: ignore[arg-type]


def test_the_page_says_what_was_found_and_what_was_not(tmp_path: Path):
    found = results()
    drawn = plots.draw(found, tmp_path)
    assert drawn == ["peers_latency.png", "peers_memory.png"]
    assert all((tmp_path / file).read_bytes().startswith(b"\x89PNG") for file in drawn)
    page = report.page(found, drawn)
    assert (
        "| other, gRPC | 1.50 | 100 | 2.00 / 4.00 | 2.00 | 2.00 | 500 / 500 "
        "| 1.000000 / 1.000000 | 82.00 |" in page
    )
    assert "| other, gRPC | 1.00 | 1.00 | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 |" in page
    assert "| **arrowhead-float32, gRPC** | 1.00 | 1.00 |" in page
    assert "- a third: no network" in page
    assert "![Memory of each server in MB](peers_memory.png)" in page
    assert "smoke run" not in page
    assert json.loads(found.to_json())["servers"][1]["loads"][0]["requests"] == 18


def test_a_page_without_ourselves_has_no_ratios(tmp_path: Path):
    found = results(against="gone", quick=True, servers=[], in_process=[], missing={})
    page = report.page(found, plots.draw(found, tmp_path))
    assert "## Against" not in page
    assert "Not measured" not in page
    assert "smoke run" in page


def test_a_second_protocol_has_no_cosine_of_its_own():
    seen = Seen("a, HTTP", "arrowhead-x", [1.0], [1.0])
    found = seen.result("a", [], np.eye(2, dtype=np.float32))
    assert found.closeness is None
    assert found.ours
    assert Closeness.of("b", np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)).worst == 1
