# SPDX-License-Identifier: Apache-2.0
"""Counters of models and gateway after requests whose counts are known."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from arrowhead_client import Client, InvalidRequest
from arrowhead_conversion import settings
from arrowhead_engine.account import PERIOD_S
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_server.supervisor import Server, running_server

from .conftest import wait_until
from .gateways import started, stopped

Series = dict[tuple[str, ...], float]
OF_MODEL = "model", "version", "model_instance"


@pytest.fixture(scope="module")
def quiet(minilm_repository: Path) -> Iterator[Server]:
    """A server that no probe asks anything meanwhile."""
    with running_server(minilm_repository, probe_interval_s=3600) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(minilm_repository: Path) -> Tokenizer:
    return Tokenizer.open(minilm_repository / "minilm_tokenizer" / "1")


def scraped(url: str) -> Series:
    """Values by name and labels."""
    families = text_string_to_metric_families(httpx.get(url).text)
    return {
        (
            sample.name,
            *(f"{key}={sample.labels[key]}" for key in sorted(sample.labels)),
        ): sample.value
        for family in families
        for sample in family.samples
    }


def of(server: Server, part: str) -> dict[str, float]:
    """Ours of one model, by name and the label that is its own."""
    found = {}
    for (name, *labels), value in scraped(server.metrics_url).items():
        if name.startswith("arrowhead_") and f"model=minilm_{part}" in labels:
            rest = [one for one in labels if one.split("=")[0] not in OF_MODEL]
            found["/".join([name.removeprefix("arrowhead_"), *rest])] = value
    return found


def added(server: Server, part: str, before: dict[str, float], batches: int) -> dict[str, float]:
    """What was counted since, once all of it was handed on; without what was not."""
    wait_until(
        lambda: of(server, part)["batches_total"] == before["batches_total"] + batches,
        f"{batches} batches of {part}",
    )
    now = of(server, part)
    return {name: now[name] - before[name] for name in now if now[name] != before[name]}


def known(server: Server, part: str) -> dict[str, float]:
    wait_until(lambda: of(server, part), f"the first counts of {part}")
    return of(server, part)


def test_counts_of_a_known_request(quiet: Server, tokenizer: Tokenizer) -> None:
    texts = ["one", "two words", "one", "word " * 400]
    lengths = [len(ids) for ids in tokenizer.encode(texts)[0]]
    assert lengths == [3, 4, 3, 256]
    tokens, encoder = known(quiet, "tokenizer"), known(quiet, "encoder")
    with Client(quiet.grpc_url) as client:
        client.embed(texts)
    assert added(quiet, "tokenizer", tokens, 1) == {
        "texts_total": 4,
        "tokens_total": 266,
        "texts_truncated_total": 1,
        "batches_total": 1,
    }
    assert added(quiet, "encoder", encoder, 1) == {
        "texts_total": 4,
        "tokens_total": 266,
        "batches_total": 1,
        "texts_reused_total/how=batch": 1,
        "tokens_computed_total": 263,
        "padding_saved_tokens_total": 3 * 256 - 263,
        **{f"batches_by_tokens_total/le={end}": 1 for end in ("1024", "4096", "+Inf")},
    }
    # Asked again in another order: Triton's cache does not know it, the encoder does.
    encoder = known(quiet, "encoder")
    with Client(quiet.grpc_url) as client:
        client.embed(["two words", "one"])
    assert added(quiet, "encoder", encoder, 1) == {
        "texts_total": 2,
        "tokens_total": 7,
        "batches_total": 1,
        "texts_reused_total/how=step": 2,
    }


def test_counts_of_refused_requests(quiet: Server) -> None:
    tokens, encoder = known(quiet, "tokenizer"), known(quiet, "encoder")
    with Client(quiet.grpc_url) as client:
        for _ in range(3):
            with pytest.raises(InvalidRequest):
                client.embed_ids([[101, 999_999, 102]])
        client.embed(["a text of its own"])
    assert added(quiet, "encoder", encoder, 1)["requests_refused_total"] == 3
    assert "requests_refused_total" not in added(quiet, "tokenizer", tokens, 1)


def test_each_process_of_a_model_counts_for_itself(
    minilm_repository: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    repository = shutil.copytree(minilm_repository, tmp_path / "models")
    settings.set_instances(repository, "minilm", 2)
    texts = [f"number {number} of {'many ' * (number % 9)}" for number in range(200)]
    names = {f"model_instance=minilm_encoder_0_{number}" for number in range(2)}

    def by_process(name: str) -> dict[str, float]:
        return {
            process: value
            for (metric, *labels), value in scraped(server.metrics_url).items()
            for process in names.intersection(labels)
            if metric == f"arrowhead_{name}_total"
        }

    with (
        running_server(repository, probe_interval_s=3600) as server,
        ThreadPoolExecutor(8) as pool,
        Client(server.grpc_url, batch_size=1, concurrency=8) as client,
    ):
        wait_until(lambda: by_process("texts").keys() == names, "the first counts of both")
        time.sleep(2 * PERIOD_S)  # the warm-up's and the first probe's are there, too
        before = {name: by_process(name) for name in ("texts", "tokens", "batches")}
        list(pool.map(client.embed, texts))
        sent = sum(before["texts"].values()) + len(texts)
        wait_until(lambda: sum(by_process("texts").values()) == sent, f"{len(texts)} texts more")
        tokens = sum(map(len, tokenizer.encode(texts)[0]))
        assert sum(by_process("tokens").values()) == sum(before["tokens"].values()) + tokens
        # Both had some: each went to whichever was free.
        assert all(by_process("batches")[one] > before["batches"][one] for one in names)


def test_what_a_gateway_counts(quiet: Server, tokenizer: Tokenizer) -> None:
    process, url = started(f"--url={quiet.grpc_url}")
    try:
        texts = [f"text {number} of a list" for number in range(20)]
        lengths = [len(ids) for ids in tokenizer.encode(texts)[0]]
        for sent in (texts, texts, ["word " * 400]):
            answer = httpx.post(f"{url}/embed", json={"inputs": sent, "truncate": True})
            assert answer.status_code == 200
        bad = httpx.post(f"{url}/embed", json={"inputs": "word " * 400})
        assert bad.status_code == 413
        told = scraped(f"{url}/metrics")
        assert told["arrowhead_gateway_tokens_total",] == 2 * sum(lengths) + 256
        assert told["arrowhead_gateway_truncated_texts_total",] == 1
        assert told["arrowhead_gateway_triton_tokens_total",] == sum(lengths) + 256
        assert told["arrowhead_gateway_triton_seconds_count", "outcome=ok"] == 2
        assert told["arrowhead_gateway_model_swaps_total",] == 0
        assert told["arrowhead_gateway_refused_total", "reason=length"] == 1
        with Client(quiet.grpc_url) as client:
            fingerprint = client.info().fingerprint
        labels = f"fingerprint={fingerprint}", "model=minilm", "version=1"
        assert told[("arrowhead_gateway_model_info", *labels)] == 1
        assert told["process_resident_memory_bytes",] > 1e7
        # Whatever callers make up, there are no more series.
        for number in range(50):
            httpx.post(f"{url}/made/up/{number}", headers={"X-Request-Id": f"id-{number}"})
        more = scraped(f"{url}/metrics").keys() - told.keys()
        assert {key[1:] for key in more if "bucket" not in key[0]} == {
            ("path=other", "status=404"),
            ("path=/metrics", "status=200"),
            ("reason=invalid",),
        }
    finally:
        stopped(process)


def test_what_a_gateway_counts_without_triton(minilm_repository: Path) -> None:
    with running_server(minilm_repository, probe_interval_s=3600) as server:
        process, url = started(f"--url={server.grpc_url}")
        assert httpx.post(f"{url}/embed", json={"inputs": "before"}).status_code == 200
    try:
        assert httpx.post(f"{url}/embed", json={"inputs": "after"}).status_code == 503
        told = scraped(f"{url}/metrics")
        assert told["arrowhead_gateway_triton_seconds_count", "outcome=unavailable"] >= 1
        assert told["arrowhead_gateway_refused_total", "reason=triton"] == 1
    finally:
        stopped(process)
