# SPDX-License-Identifier: Apache-2.0
"""From and to object stores, which know no folders and rename nothing: S3's API, and Google's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from arrowhead_bulk import job
from arrowhead_bulk.corpus import Columns, filesystem
from arrowhead_bulk.errors import OtherJob
from arrowhead_bulk.job import Wish
from arrowhead_bulk.parts import Folder, metadata_of
from arrowhead_client import Options
from perf.peers.servers import free_port, listens, started

from .conftest import texts, write_lines, write_parquet
from .test_job import run


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """The URI of a path in a bucket."""
    with s3() if request.param == "s3" else gs() as uri:
        yield uri


@contextmanager
def s3() -> Iterator[Callable[[str], str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        where, _ = filesystem(f"s3://bucket/?{query}&allow_bucket_creation=true")
        where.create_dir("bucket")
        yield lambda path: f"s3://bucket/{path}?{query}"
    server.stop()


@contextmanager
def gs() -> Iterator[Callable[[str], str]]:
    port = free_port()
    # A process of its own: Arrow waits for this store without letting other threads run.
    command = [str(Path(sys.executable).with_name("gcp-storage-emulator")), "start"]
    where = ["--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket"]
    with started([*command, *where], []) as emulator:
        while not listens(port):
            assert emulator.is_alive(), emulator.said()
            time.sleep(0.05)
        query = f"scheme=http&endpoint_override=127.0.0.1:{port}"
        yield lambda path: f"gs://anonymous@bucket/{path}?{query}"


def put(uri: str, path: Path) -> None:
    where, inside = filesystem(uri)
    with where.open_output_stream(inside) as stream:
        stream.write(path.read_bytes())


@pytest.mark.timeout(120)
def test_a_corpus_in_a_bucket_becomes_vectors_in_it(
    store: Callable[[str], str], wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    for name, rows in (("a", texts(30)), ("b", [*texts(20, "more"), None])):
        put(store(f"corpus/{name}.parquet"), write_parquet(tmp_path / f"{name}.parquet", rows))
    mine = wish(store("corpus/*.parquet"))
    mine = Wish(mine.sources, mine.columns, store("vectors"), mine.model)
    run(mine, units=2)
    out = Folder(store("vectors"))
    assert out.names() == []  # nothing is seen before all is there
    told = run(mine)
    assert (told["rows"], told["bad"], told["parts_of_before"]) == (50, {"null": 1}, 2)
    assert {"_SUCCESS", "_job.json", "_report.json", "_bad/part-00002.parquet"} <= {*out.names()}
    table = pq.read_table(out.path, filesystem=out.filesystem)
    assert table["id"].to_pylist() == list(range(50))
    assert Folder(store(".vectors.staging")).names() == []
    assert metadata_of(store("vectors/part-00000.parquet"))["model"] == "minilm"
    # Again, and with a part that was lost.
    assert run(mine)["parts_of_before"] == 3
    out.filesystem.delete_file(out.file("part-00001.parquet"))
    assert run(mine)["parts_of_before"] == 2
    assert pq.read_table(out.path, filesystem=out.filesystem).num_rows == 50
    with pytest.raises(OtherJob, match=r"another job"):
        run(Wish(mine.sources, mine.columns, mine.out, mine.model, Options(normalize=True)))


@pytest.mark.timeout(120)
def test_publishing_that_was_broken_off_goes_on(
    store: Callable[[str], str], wish: Callable[..., Wish], tmp_path: Path, small_units: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    put(store("lines/a.jsonl"), write_lines(tmp_path / "a.jsonl", [{"t": t} for t in texts(40)]))
    mine = wish(store("lines/a.jsonl"), columns=Columns("t"))
    mine = Wish(mine.sources, mine.columns, store("late/vectors"), mine.model)
    out = Folder(store("late/vectors"))
    moved = list[str]()

    class Broken(Folder):
        def move_to(self, other: Folder, name: str) -> None:
            if len(moved) == 2:
                raise OSError("the network is gone")
            moved.append(name)
            super().move_to(other, name)

    with monkeypatch.context() as patch:
        patch.setattr(job, "Folder", Broken)
        with pytest.raises(OSError, match="network"):
            run(mine)
    assert "_SUCCESS" not in out.names()
    assert out.names()[0] == "_job.json"
    assert len(moved) == 2
    told = run(mine)
    assert told["rows"] == 40
    assert pq.read_table(out.path, filesystem=out.filesystem)["id"].to_pylist() == list(range(40))
    assert json.loads(out.read("_report.json") or b"")["rows"] == 40
