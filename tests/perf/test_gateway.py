# SPDX-License-Identifier: Apache-2.0
"""`perf.gateway`: what its ways send and read, its page, and the whole command."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from perf.gateway import _Drawn
from perf.gateway_page import draw, page
from perf.gateway_results import (
    CALLERS,
    Again,
    Batch,
    GatewayResults,
    Loaded,
    Outset,
    Same,
)
from perf.gateway_roads import OpenaiRoad, TeiRoad
from perf.machine import ROOT, describe
from perf.peers.roads import WIDTH, WrongAnswer, to_vectors
from perf.stats import Sample

KEYS = ("grpc", "stub", "naive", "tei", "openai")


@pytest.fixture(scope="module")
def measured(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What `python -m perf.gateway --quick` writes."""
    out = tmp_path_factory.mktemp("gateway") / "results"
    command = [sys.executable, "-m", "perf.gateway", "--quick"]
    command += [f"--repository={minilm_repository}", f"--out={out}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "gateway.json",
        "gateway.md",
        "gateway.png",
    ]
    return json.loads((out / "gateway.json").read_text()), (out / "gateway.md").read_text()


def test_the_command_measures_every_way(measured: tuple[Any, str]) -> None:
    results, text = measured
    assert [(one["callers"], one["key"]) for one in results["loads"]] == [
        (callers, key) for callers in CALLERS for key in KEYS
    ]
    assert all(one["p50_ms"]["median"] <= one["p99_ms"]["median"] for one in results["loads"])
    assert [one["over_ms"] is None for one in results["known"]] == [
        key == "grpc" for _ in (1, CALLERS[-1]) for key in KEYS
    ]
    assert all(
        one["start_s"]["median"] > 0 < one["idle_mb"]["median"] for one in results["outsets"]
    )
    assert "A smoke run" in text


def test_of_a_hundred_texts_the_gateway_asks_for_the_new_one(measured: tuple[Any, str]) -> None:
    asked = {one["key"]: one["asked"] for one in measured[0]["batches"]}
    wanted = {"grpc": 100, "stub": 100, "naive": 100, "tei": 1, "openai": 1}
    # The server's own probes are texts too: one every few seconds.
    assert asked == pytest.approx(wanted, abs=0.9)


def test_a_text_that_all_ask_for_is_asked_for_once(measured: tuple[Any, str]) -> None:
    asked = {one["key"]: one["asked"] for one in measured[0]["same"]}
    assert (asked["tei"], asked["openai"]) == pytest.approx((1, 1), abs=0.9)


def test_texts_that_come_again_are_remembered(measured: tuple[Any, str]) -> None:
    for one in measured[0]["again"]:
        assert (one["merged"] is not None) == (one["key"] in ("tei", "openai"))
        answered = one["hit"] + (one["merged"] or 0)
        assert 0 < one["hit"] <= answered <= one["possible"] + 1e-9
        if one["merged"] is not None:  # it forgets none of so few
            assert answered == pytest.approx(one["possible"])


async def answered(body: bytes, status: str, road: type[TeiRoad | OpenaiRoad]) -> tuple[Any, Any]:
    """What a server that answers so is sent by a road, and what comes of the answer."""
    sent: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        sent.append(head + await reader.readexactly(length))
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        one = road(server.sockets[0].getsockname()[1])
        try:
            return await one.embed(["a", "b"]), sent
        finally:
            await one.close()


VECTORS = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)


async def test_a_road_reads_lists_of_numbers() -> None:
    body = orjson.dumps(VECTORS, option=orjson.OPT_SERIALIZE_NUMPY)
    vectors, (sent,) = await answered(body, "200 OK", TeiRoad)
    assert sent.startswith(b"POST /embed ")
    assert sent.endswith(b'{"inputs":["a","b"]}')
    assert np.array_equal(to_vectors(vectors), VECTORS)


async def test_a_road_reads_base64() -> None:
    data = [{"embedding": base64.b64encode(row.tobytes()).decode()} for row in VECTORS]
    vectors, (sent,) = await answered(orjson.dumps({"data": data}), "200 OK", OpenaiRoad)
    assert sent.startswith(b"POST /v1/embeddings ")
    assert b'"encoding_format":"base64"' in sent
    assert np.array_equal(to_vectors(vectors), VECTORS)


@pytest.mark.parametrize(
    ("body", "status"), [(b'{"error": "x"}', "422 No"), (b"[[0.5]]", "200 OK"), (b"[]", "200 OK")]
)
async def test_an_answer_without_vectors_is_an_error(body: bytes, status: str) -> None:
    with pytest.raises(WrongAnswer):
        await answered(body, status, TeiRoad)


def test_texts_are_drawn_by_rank_and_counted() -> None:
    drawn = _Drawn(["a", "b", "c"], [0, 1, 0, 2, 0])
    given = Counter(drawn()[0] for _ in range(4))
    assert given == {"a": 2, "b": 1, "c": 1}
    assert (drawn.count, drawn.different) == (4, 3)


def _sample(value: float) -> Sample:
    return Sample.of([value, value])


def _loaded(key: str, callers: int, ms: float) -> Loaded:
    over = None if key == "grpc" else _sample(ms - 2)
    return Loaded(
        key, key.upper(), callers, _sample(ms), _sample(2 * ms), _sample(callers * 1e3 / ms), over
    )


@pytest.fixture
def results() -> GatewayResults:
    loads = [
        _loaded(key, callers, callers * (2 + place / 4))
        for callers in CALLERS
        for place, key in enumerate(KEYS)
    ]
    return GatewayResults(
        machine=describe(),
        quick=False,
        seconds=1.0,
        other_work=_sample(1.0),
        triton="2.51.0",
        loads=loads,
        known=loads[:5],
        batches=[Batch("tei", "TEI", _sample(3.25), 1.0)],
        same=[Same("naive", "NAIVE", _sample(4.5), 31.5)],
        again=[
            Again("grpc", "GRPC", 1000, 800.4, 9.0, 21.0, 0.5, 0.25, None),
            Again("tei", "TEI", 1234, 900.6, 8.0, 20.0, 0.5, 0.375, 0.125),
        ],
        outsets=[Outset("gateway", _sample(0.75), _sample(70), 72.5)],
    )


def test_the_page_says_what_was_found(results: GatewayResults, tmp_path: Path) -> None:
    drawn = draw(results, tmp_path)
    text = page(results, drawn)
    assert all((tmp_path / name).stat().st_size > 1000 and f"({name})" in text for name in drawn)
    assert "| TEI | 1 | 2.75 (2.75-2.75) | 5.50 (5.50-5.50) | 364 (364-364) | 0.75" in text
    assert "0.75 (0.75-0.75) ms of p50; wanted below 1.5 ms: met." in text
    assert "| TEI | 3.25 (3.25-3.25) | 1.00 |" in text
    assert "| NAIVE | 4.50 (4.50-4.50) | 31.50 |" in text
    assert "| GRPC | 800 | 9.00 | 21.00 | 1,000 | 50.0% | 25.0% |  |" in text
    assert "| TEI | 901 | 8.00 | 20.00 | 1,234 | 50.0% | 37.5% | 12.5% |" in text
    assert "| gateway | 0.75 (0.75-0.75) | 70 (70-70) | 72 |" in text
    assert "smoke run" not in text
    assert json.loads(results.to_json())["batches"][0]["asked"] == 1.0


def test_the_page_says_when_the_gateway_adds_too_much(results: GatewayResults) -> None:
    slow = [
        replace(one, over_ms=_sample(1.6)) if (one.key, one.callers) == ("tei", 1) else one
        for one in results.loads
    ]
    assert "wanted below 1.5 ms: **not met**." in page(replace(results, loads=slow), [])
