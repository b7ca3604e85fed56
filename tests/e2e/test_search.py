# SPDX-License-Identifier: Apache-2.0
"""`arrowhead index` and `arrowhead search` with the real model, on a slice of SciFact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowhead_client import Client, Document, Index
from arrowhead_client import measures as m
from arrowhead_client.datasets import RetrievalSet
from arrowhead_client.evaluate import score_retrieval
from arrowhead_server.supervisor import Server

SCIFACT = Path(__file__).parents[1] / "data" / "scifact-small"


def _arrowhead(*arguments: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-m", "arrowhead_client.cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_scifact_is_found_through_an_index(server: Server, client: Client, tmp_path: Path) -> None:
    """At least as well as by an exact search over the whole documents."""
    folder = str(tmp_path / "index")
    build = [
        *("index", "build", str(SCIFACT / "corpus.jsonl"), "--index", folder),
        *("--id", "_id", "--text", "title", "--text", "text", "--url", server.grpc_url),
    ]
    data = RetrievalSet.read(SCIFACT)
    told = _arrowhead(*build)
    assert told["documents"] == told["changed"] == len(data.documents)
    assert _arrowhead(*build)["changed"] == 0

    lines = (SCIFACT / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    place = {json.loads(line)["_id"]: number for number, line in enumerate(lines)}
    index = Index.open(folder, client)
    hits = np.full((len(data.queries), 100), m.NO_HIT, np.int64)
    for row, query in zip(hits, data.queries, strict=True):
        found = index.search(query, limit=100)
        row[: len(found)] = [place[hit.id] for hit in found]
    found_gains = m.gains(hits, data.judged)
    whole = {s.measure: s.value for s in score_retrieval(data, client.embed)}
    assert 100 * m.ndcg(found_gains, data.judged, 10).mean() >= whole["nDCG@10"] - 1
    assert 100 * m.recall(found_gains, data.judged, 100).mean() >= whole["recall@100"] - 1

    info = _arrowhead("index", "info", "--index", folder)
    assert info["fingerprint"] == client.info().fingerprint != ""
    assert info["passages"] > info["documents"]
    told = _arrowhead(
        *("search", data.queries[0], "--index", folder, "--url", server.http_url, "--limit", "3")
    )
    assert [hit["id"] for hit in told["hits"]] == [
        hit.id for hit in index.search(data.queries[0], limit=3)
    ]
    assert all(0 < len(hit["snippet"]) <= 240 for hit in told["hits"])


def test_scores_are_the_cosines_of_the_models_vectors(client: Client, tmp_path: Path) -> None:
    texts = ["Tea is made of leaves.", "Coffee is made of beans.", "The train is late.", ""]
    index = Index.create(tmp_path / "index", client)
    index.add(Document(f"{n}", text) for n, text in enumerate(texts))
    query = "How do you make tea?"
    scores = {int(hit.id): hit.score for hit in index.search(query)}
    wanted = client.similarity(query, texts)[0]
    assert [scores[n] for n in range(len(texts))] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert index.search(query)[0].id == "0"


def test_the_model_reads_all_of_every_passage(client: Client, tmp_path: Path) -> None:
    """Also of scripts in which a character is a token, or several."""
    index = Index.create(tmp_path / "index", client)
    long = {"zh": "快速的棕色狐狸。" * 300, "emoji": "🙂🚀" * 900, "code": "x=[{(1)}];" * 400}
    index.add(Document(name, text) for name, text in long.items())
    rows = index._store.rows(list(long), ["id", "text", "_part"]).to_pylist()
    assert not client.count_tokens([row["text"] for row in rows]).truncated.any()
    for name, text in long.items():
        parts = sorted((row["_part"], row["text"]) for row in rows if row["id"] == name)
        assert "".join(part for _, part in parts) == text


def test_prompts_are_the_models_own(prompted: Server, tmp_path: Path) -> None:
    with Client(prompted.grpc_url) as client:
        index = Index.create(tmp_path / "index", client)
        index.add([Document("a", "Tea is made of leaves.")])
        [hit] = index.search("how is tea made?")
        asked = client.embed("query: how is tea made?")
        assert hit.score == pytest.approx(
            float(asked @ client.embed("Tea is made of leaves.")), abs=1e-5
        )
