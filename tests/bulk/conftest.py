# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrowhead_bulk import corpus as corpus_module
from arrowhead_bulk.corpus import Columns
from arrowhead_bulk.job import Wish
from arrowhead_bulk.vectors import Model

ATOM = 16


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> int:
    """Units of so many rows, where they have 4,096."""
    monkeypatch.setattr(corpus_module, "ATOM_ROWS", ATOM)
    return ATOM


def texts(count: int, of: str = "text") -> list[str]:
    """Texts that differ, of several lengths."""
    return [f"{of} number {n}" + " and more of it" * (n % 7) for n in range(count)]


def write_parquet(path: Path, rows: Sequence[Any], *, group: int = 1000, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(rows), **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def wish(minilm_repository: Path, tmp_path: Path) -> Callable[..., Wish]:
    """A wish for MiniLM's vectors of some files."""

    def make(*sources: Path | str, out: str = "vectors", **others: Any) -> Wish:
        columns = others.pop("columns", Columns("text"))
        model = others.pop("model", Model("minilm", str(minilm_repository)))
        return Wish(tuple(map(str, sources)), columns, str(tmp_path / out), model, **others)

    return make


def vectors_of(folder: Path) -> pa.Table:
    """All that readers see of a folder."""
    return pq.read_table(folder)
