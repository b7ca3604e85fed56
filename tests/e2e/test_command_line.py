# SPDX-License-Identifier: Apache-2.0
"""The commands a user types, against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrowhead_client import Client, cosine_similarity, dequantize
from arrowhead_server.supervisor import Server

ROOT = Path(__file__).parents[2]


def arrowhead(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arrowhead_client.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_embed_to_json_lines(server: Server) -> None:
    out = arrowhead("embed", "hello", "world", "--url", server.grpc_url)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["hello", "world"]
    assert np.linalg.norm(rows[0]["embedding"]) == pytest.approx(1, abs=1e-3)


def test_embed_from_stdin_to_files(server: Server, tmp_path: Path) -> None:
    lines = "first line\nsecond line\nthird line\n"
    npy, parquet = tmp_path / "out.npy", tmp_path / "out.parquet"
    for path in (npy, parquet):
        out = arrowhead(
            *("embed", "--file", "-", "--url", server.http_url),
            *("--format", path.suffix[1:], "--out", str(path)),
            stdin=lines,
        )
        assert out.returncode == 0, out.stderr
    table = pq.read_table(parquet)
    assert table["text"].to_pylist() == lines.splitlines()
    vectors = np.load(npy)
    assert vectors.shape == (3, 384)
    stored = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, stored, atol=1e-5)


def test_embed_writes_whole_numbers(server: Server, tmp_path: Path) -> None:
    """int8 by every format, whose types are the same, and near to what float32 says."""
    texts = ["a cat sits on the mat", "stock markets fell"]
    common = ("embed", *texts, "--url", server.grpc_url)
    for form in ("npy", "parquet", "arrow", "jsonl"):
        out = arrowhead(
            *common, "--precision", "int8", "--format", form, "--out", str(tmp_path / form)
        )
        assert out.returncode == 0, out.stderr
    codes = np.load(tmp_path / "npy")
    assert (codes.dtype, codes.shape) == (np.int8, (2, 384))
    with pa.memory_map(str(tmp_path / "arrow")) as mapped:
        tables = [pq.read_table(tmp_path / "parquet"), pa.ipc.open_file(mapped).read_all()]
        for table in tables:
            assert table["embedding"].type == pa.list_(pa.int8(), 384)
            assert table["embedding"].to_pylist() == codes.tolist()
    rows = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert [row["embedding"] for row in rows] == codes.tolist()
    with Client(server.grpc_url) as client:
        cosines = cosine_similarity(
            dequantize(codes, "int8", client.info().ranges), client.embed(texts)
        )
    assert cosines.diagonal().min() > 0.99


def test_embed_refuses_to_cut(server: Server) -> None:
    out = arrowhead("embed", "a", "word " * 300, "--truncate", "none", "--url", server.http_url)
    assert out.returncode == 1
    assert "text 1 has more than the 256 tokens" in out.stderr


def test_embed_by_input_type(prompted: Server) -> None:
    out = arrowhead("embed", "a", "--input-type", "query", "--url", prompted.grpc_url)
    assert out.returncode == 0, out.stderr
    with Client(prompted.grpc_url) as client:
        wanted = client.embed("query: a")
    np.testing.assert_allclose(json.loads(out.stdout)["embedding"], wanted, atol=1e-3)


def test_similarity_ranks(server: Server) -> None:
    out = arrowhead(
        *("similarity", "a cat", "a kitten", "the stock market", "--json"),
        *("--url", server.grpc_url),
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.index("kitten") < out.stdout.index("stock")


def test_info_tells_what_is_served(prompted: Server) -> None:
    out = arrowhead("info", "minilm", "--url", prompted.grpc_url)
    assert out.returncode == 0, out.stderr
    told = dict(line.split(maxsplit=1) for line in out.stdout.splitlines())
    assert (told["dimension"], told["max_seq_length"], told["pooling"]) == ("384", "256", "mean")
    assert told["certificate"].startswith("cosine 0.99999")
    assert "query: 'query: '" in told["prompts"]
    out = arrowhead("info", "--json", "--url", prompted.http_url)
    assert json.loads(out.stdout)["fingerprint"] == told["fingerprint"]
    assert arrowhead("info", "another", "--url", prompted.grpc_url).returncode == 1


def test_a_server_that_is_not_there() -> None:
    out = arrowhead("embed", "hello", "--url", "grpc://127.0.0.1:1")
    assert out.returncode == 1
    assert "127.0.0.1:1" in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


def test_inspect_shows_the_file_as_a_table(minilm_weights: Path) -> None:
    out = arrowhead("inspect", str(minilm_weights))
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].split() == ["layer_name", "dtype", "shape", "num_params", "bytes", "offset"]
    assert lines[1].split()[:4] == [
        "embeddings.word_embeddings.weight",
        "float16",
        "30522x384",
        "11720448",
    ]
    assert "101 tensors, 22,565,376 parameters" in lines[-1]


def test_inspect_refuses_a_spoiled_file(minilm_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.parquet"
    path.write_bytes(minilm_weights.read_bytes()[:-1])
    out = arrowhead("inspect", str(path))
    assert out.returncode == 1
    assert out.stderr.startswith("arrowhead: ")
    assert len(out.stderr.strip().splitlines()) == 1


def test_convert_names_what_it_knows(tmp_path: Path, minilm_source: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "new"}')
    out = arrowhead("convert", str(model), "--name", "m", "--repository", str(tmp_path / "r"))
    assert out.returncode == 1
    assert "architecture 'new': transformers" in out.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "command", ["convert", "serve", "embed", "evaluate", "similarity", "inspect"]
)
def test_help_teaches_by_example(command: str) -> None:
    out = arrowhead(command, "--help")
    assert out.returncode == 0
    assert f"arrowhead {command} " in out.stdout.split("Examples:")[1]
