# SPDX-License-Identifier: Apache-2.0
"""`perf.profile`: what it reads, what it sends, its copies of a repository, and its page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from arrowhead_server.supervisor import Server, running_server
from perf.copies import with_instances, with_no_op
from perf.machine import describe
from perf.profile_load import Latency, LoadFailed, Sent, Stream, infer_request, run
from perf.profile_page import page
from perf.profile_plots import draw
from perf.profile_results import ProfileResults
from perf.profile_server import Instances, Line, Repeated, Third, zipf_ranks
from perf.profile_stats import Counts, parse_metrics, parse_statistics
from perf.profile_time import (
    ENCODER,
    TOKENIZER,
    InProcess,
    Overhead,
    Seen,
    TimeResults,
    take_apart,
)
from perf.scaling import Point, ScalingResults, Series, Size, random_ids, random_model, series_of
from perf.server import MODEL, ProcessMemory
from perf.stats import Sample

# The metrics are as Triton 2.51 writes them; the statistics of one model are in two versions.
METRICS = """\
# HELP nv_cache_num_hits_per_model Number of cache hits per model
# TYPE nv_cache_num_hits_per_model counter
nv_cache_num_hits_per_model{model="minilm",version="1"} 7
nv_cache_num_hits_per_model{model="minilm",version="2"} 2
nv_cache_util 0.09
"""


def _statistics(version: str, requests: int) -> dict[str, object]:
    spent = {"count": requests, "ns": 1000 * requests}
    stages = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "name": "minilm",
        "version": version,
        "inference_count": 4 * requests,
        "execution_count": 2 * requests,
        "inference_stats": {
            **dict.fromkeys(stages, spent),
            "cache_hit": {"count": requests, "ns": 1},
            "cache_miss": {"count": 3 * requests, "ns": 1},
        },
    }


def test_statistics_of_all_versions_add_up():
    read = parse_statistics({"model_stats": [_statistics("1", 10), _statistics("2", 5)]})
    assert list(read) == ["minilm"]
    counts = read["minilm"]
    assert (counts.requests, counts.total_ns) == (15, 15_000)
    assert (counts.hits, counts.misses, counts.hit_rate) == (15, 45, 0.25)
    assert counts.batch == 2.0
    assert counts.us("infer") == counts.us("total") == 1.0
    assert counts.since(counts) == Counts()


def test_nothing_counted_is_nothing_and_no_error():
    assert (Counts().batch, Counts().hit_rate, Counts().us("queue")) == (0, 0, 0)


def test_metrics_are_read_by_name_and_model():
    read = parse_metrics(METRICS)
    assert read["nv_cache_num_hits_per_model", "minilm"] == 9
    assert read["nv_cache_util", ""] == 0.09
    assert len(read) == 2


def test_a_request_is_what_triton_reads():
    request = service_pb2.ModelInferRequest.FromString(infer_request(["ab", "ä"]))
    assert request.model_name == MODEL
    assert list(request.inputs[0].shape) == [2, 1]
    assert request.raw_input_contents[0] == b"\2\0\0\0ab\2\0\0\0" + "ä".encode()


def test_few_texts_come_often_and_most_come_seldom():
    ranks = zipf_ranks(1000, 1.0, 20_000)
    assert ranks.tolist() == zipf_ranks(1000, 1.0, 20_000).tolist()
    assert 0 <= ranks.min() < ranks.max() < 1000
    often = Counter(ranks.tolist())
    # Rank 0 has 1 / (1 + 1/2 + ... + 1/1000) of all draws, rank 1 half as many.
    share = 1 / sum(1 / n for n in range(1, 1001))
    assert often[0] / 20_000 == pytest.approx(share, rel=0.1)
    assert often[0] / often[1] == pytest.approx(2, rel=0.15)


def test_copies_leave_the_repository_alone(minilm_repository: Path, tmp_path: Path):
    def look() -> dict[Path, float]:
        return {file: file.stat().st_mtime for file in minilm_repository.rglob("*")}

    before = look()
    copy = with_instances(minilm_repository, tmp_path / "instances", 2)
    with_no_op(minilm_repository, tmp_path / "no_op")
    assert look() == before
    assert "count: 2" in (copy / "minilm_encoder" / "config.pbtxt").read_text()
    weights = copy / "minilm_encoder" / "1" / "weights.parquet"
    assert weights.resolve() == (minilm_repository / weights.relative_to(copy)).resolve()


def test_streams_run_side_by_side_on_an_encoder_that_computes_nothing(
    minilm_repository: Path, tmp_path: Path
):
    copy = with_no_op(minilm_repository, tmp_path / "repository")
    with running_server(copy) as server:
        _ask_ones(server)


def _ask_ones(server: Server) -> None:
    address = server.address
    with pytest.raises(LoadFailed, match="INVALID_ARGUMENT"):
        run(Stream(address, [infer_request(["a"] * 101)], 1, 5.0))
    few = [infer_request([f"text {i}"]) for i in range(20)]
    many = [infer_request([f"batch {i}", "of two"]) for i in range(50)]
    one, other = run(Stream(address, few, 1, 30.0), Stream(address, many, 4, 30.0))
    assert (len(one.ms), len(other.ms)) == (20, 50)
    assert 0 < one.percentile_ms(50) <= max(one.ms) < 30_000

    from arrowhead_client import Client

    with Client(server.grpc_url) as client:
        assert np.array_equal(client.embed(["a new text"]), np.ones((1, 384), np.float32))


def test_a_random_model_opens_and_embeds(tmp_path: Path):
    from arrowhead_engine.encoder import Encoder

    parameters = random_model(tmp_path / "weights.parquet", 64, 2)
    assert parameters == 2 * 12 * 64 * 64
    vectors = Encoder.open(tmp_path / "weights.parquet", device="cpu").embed(random_ids(3, 16))
    assert vectors.shape == (3, 64)
    assert np.isfinite(vectors).all()


def test_the_smoke_run_has_fewer_points_of_the_same_series():
    full, quick = series_of(quick=False), series_of(quick=True)
    assert list(full) == list(quick)
    for name, points in full.items():
        assert set(quick[name]) <= set(points)
        assert 1 < len(quick[name]) < len(points)


def _sample(value: float) -> Sample:
    return Sample.of([value, value])


def _latency(ms: float) -> Latency:
    return Latency.of([Sent([ms] * 10, ms / 100)])


def _counts(us: int) -> Counts:
    """Ten requests of 10 us in a queue, 10 in, 10 out and the rest computing."""
    return Counts(10, us * 10_000, 10, 100_000, 100_000, us * 10_000 - 300_000, 100_000, 10, 5)


def _seen(title: str) -> Seen:
    counts = {MODEL: _counts(2500), TOKENIZER: _counts(400), ENCODER: _counts(2000)}
    return Seen(title, 1, _latency(3.0), [3000.0], [counts], _sample(20.0))


INSIDE = InProcess(2, _sample(60), _sample(10), _sample(20), _sample(1500), _sample(30))


def test_the_parts_of_a_request_add_up_to_what_its_caller_sees():
    where = take_apart(_seen("alone"), INSIDE)
    assert where.total_us == pytest.approx(3000)
    parts = {(part.where, part.name): part.us.median for part in where.parts}
    assert parts["client", "gRPC, loopback, the caller's own loop"] == 500
    assert parts["ensemble", "cache and hand-over between models"] == pytest.approx(100)
    assert parts[ENCODER, "infer: the rest"] == pytest.approx(2000 - 30 - 1550)
    no_op = take_apart(_seen("no-op"), INSIDE, no_op=True)
    assert no_op.total_us == pytest.approx(3000)
    assert (ENCODER, "infer: engine") not in {(part.where, part.name) for part in no_op.parts}
    assert where.seen.batch == 2  # ten texts in five executions


def _scaling(dearest: float) -> ScalingResults:
    points = [Point(1, 8, _sample(100)), Point(1, 16, _sample(dearest)), Point(1, 24, _sample(90))]
    size = Size(384, 6, "int8", 10_000_000, 0.1, points)
    return ScalingResults(
        {"int8": "native"}, {"bfloat16": "a reason"}, [Series("length: one text", "int8", points)],
        [size],
    )  # fmt: skip


def _results(*, dearest: float = 110.0, quick: bool = False) -> ProfileResults:
    alone, loaded, no_op = (take_apart(_seen(t), INSIDE) for t in ("one", "32 clients", "no-op"))
    short = _latency(3.0)
    line = Line("100 x 256 tokens", _latency(2000.0), short, _latency(2100.0))
    third = Third(short, 60, 40, 0.7)
    memory = [ProcessMemory("tritonserver", 200.0, 150.0)]
    return ProfileResults(
        machine=describe(),
        quick=quick,
        seconds=300.0,
        other_work=_sample(1.0),
        triton="2.51.0",
        engine="cpu float32, native engine",
        time=TimeResults([alone, loaded, no_op], [Overhead("a new text", short, short)], short),
        scaling=_scaling(dearest),
        line=[Line("nothing", None, short, None), line],
        repeated=Repeated(20_000, 1.0, 32, short, [third] * 3, 180, 120, 180, 120),
        instances=[Instances(2, 1.5, short, line, memory, memory)],
    )


def test_the_page_says_what_was_found(tmp_path: Path):
    results = _results()
    drawn = draw(results, tmp_path)
    text = page(results, drawn)
    assert all((tmp_path / name).stat().st_size > 1000 and f"({name})" in text for name in drawn)
    assert "| minilm_encoder | infer: engine | 1,500 (1,500-1,500), 50% |" in text
    assert "No bfloat16: a reason." in text
    assert "60.0% by Triton's statistics (180 hits, 120 misses), 60.0% by its metrics" in text
    assert "| 100 x 256 tokens | 2,000.0 | 3.0 | 3.0 | 3.0 |" in text
    assert "| 2 | 1.50 | 150 | 150 |" in text
    assert "smoke run" not in text
    assert json.loads(results.to_json())["repeated"]["hits"] == 180


def test_the_page_says_whether_there_is_a_cliff():
    assert "No cliff. Largest rise between neighbours: 1.10 times, from 1 x 8" in page(
        _results(), []
    )
    steep = page(_results(dearest=130.0), [])
    assert "**A cliff.** Largest rise between neighbours: 1.30 times, from 1 x 8" in steep


def test_a_page_of_nothing_has_no_empty_chapters():
    nothing = ProfileResults(
        describe(), True, 1.0, _sample(20.0), "", "cpu float32", None, None, [], None, []
    )
    text = page(nothing, [])
    assert "## " not in text
    assert "A smoke run" in text
    assert "Others worked on this machine" in text
