# SPDX-License-Identifier: Apache-2.0
"""With a real Triton: it computes for a job, and what a job made is searched through it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from arrowhead_bulk.corpus import Columns
from arrowhead_bulk.errors import BadModel
from arrowhead_bulk.job import Wish
from arrowhead_bulk.vectors import Model
from arrowhead_client import Client, Index, Options
from arrowhead_client.cli import main
from arrowhead_server.supervisor import Server, running_server

from .conftest import texts, vectors_of, write_parquet
from .test_job import run

DOCUMENTS = ["Tea is made of leaves.", "Bread is made of flour.", "Steel is made of iron."]


@pytest.fixture(scope="module")
def server(minilm_repository: Path) -> Iterator[Server]:
    with running_server(minilm_repository) as server:
        yield server


@pytest.mark.parametrize("way", ["grpc_url", "http_url"])
def test_tritons_give_the_same(
    way: str, server: Server, wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    rows = [*texts(40), "word " * 400, ""]
    write_parquet(tmp_path / "in.parquet", rows)
    told = run(wish(tmp_path / "in.parquet", model=Model("minilm", endpoint=getattr(server, way))))
    assert (told["rows"], told["truncated"]) == (42, 1)
    run(wish(tmp_path / "in.parquet", out="alone"))
    theirs, ours = vectors_of(tmp_path / "vectors"), vectors_of(tmp_path / "alone")
    for name in ("id", "tokens", "truncated"):
        assert theirs[name].equals(ours[name])
    a, b = (np.stack(table["embedding"].to_numpy()) for table in (theirs, ours))
    assert (a * b).sum(1).min() > 0.9999


def test_an_endpoint_where_nobody_is(wish: Callable[..., Wish], tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", texts(3))
    with pytest.raises(BadModel, match=r"grpc://127.0.0.1:9"):
        run(wish(tmp_path / "in.parquet", model=Model("minilm", endpoint="grpc://127.0.0.1:9")))


def build(server: Server, *arguments: Path | str) -> Result:
    url = f"--url={server.grpc_url}"
    return CliRunner().invoke(main, ["index", "build", *map(str, arguments), url, "--json"])


def made(wish: Callable[..., Wish], tmp_path: Path, **others: Any) -> Path:
    year = pa.array([2001, 2002, 2003])
    names = pa.array(["tea", "bread", "steel"])
    write_parquet(tmp_path / "in.parquet", DOCUMENTS, id=names, year=year)
    columns = others.pop("columns", Columns("text", "id", ("text", "year")))
    options = others.pop("options", Options(input_type="document"))
    run(wish(tmp_path / "in.parquet", columns=columns, options=options, **others))
    return tmp_path / "vectors"


def test_what_a_job_made_is_searched(
    server: Server, wish: Callable[..., Wish], tmp_path: Path
) -> None:
    folder, path = made(wish, tmp_path), tmp_path / "index"
    told = json.loads(build(server, folder, f"--index={path}").stdout)
    assert (told["changed"], told["documents"]) == (3, 3)
    with Client(server.grpc_url) as client:
        index = Index.open(path, client)
        (hit,) = index.search("what is a hot drink made of?", limit=1)
        assert (hit.id, hit.fields) == ("tea", {"year": 2001})
        assert hit.snippet == DOCUMENTS[0]
        assert index.search("bread", where="year > 2002")[0].id == "steel"
        alone = float(client.embed(DOCUMENTS[0]) @ client.embed("tea"))
        assert index.search("tea", limit=1)[0].score == pytest.approx(alone, abs=1e-3)
    again = json.loads(build(server, folder, f"--index={path}").stdout)
    assert (again["changed"], again["documents"]) == (0, 3)


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({"columns": Columns("text", "id")}, "no column 'text'.*--keep text"),
        ({"kind": "int8"}, "precision 'int8'"),
        ({"options": Options(dimensions=64)}, "dimensions 64"),
        ({"options": Options(prompt="query: ")}, "prompt 'query: '"),
    ],
)
def test_vectors_that_an_index_cannot_hold(
    others: dict[str, Any], why: str, server: Server, wish: Callable[..., Wish], tmp_path: Path
) -> None:
    result = build(server, made(wish, tmp_path, **others), f"--index={tmp_path / 'index'}")
    assert result.exit_code == 1
    assert re.search(why, result.output + str(result.exception)), result.output
