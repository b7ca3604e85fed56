# SPDX-License-Identifier: Apache-2.0
"""`arrowhead bulk embed`."""

from __future__ import annotations

import json
import os
from typing import Any, get_args

import click

from arrowhead_bulk.corpus import Columns
from arrowhead_bulk.errors import BulkError
from arrowhead_bulk.job import Job, Wish, planned
from arrowhead_bulk.progress import Progress, in_words, report
from arrowhead_bulk.vectors import Model
from arrowhead_bulk.work import KINDS, Kind, Worker
from arrowhead_client import Options
from arrowhead_client._options import InputType
from arrowhead_engine.compute import has_cuda

WORTH_RAY = 100_000  # rows; fewer are done before a cluster is up


@click.group()
def bulk() -> None:
    """Embed corpora that are larger than one machine.

    \b
    Example:
      arrowhead bulk embed 'corpus/*.parquet' --out vectors/
    """  # noqa: D301 (click reads the character)


@bulk.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", "-o", required=True, help="A folder that is not there yet, or a URI.")
@click.option("--column", default="text", show_default=True, help="The column that is embedded.")
@click.option("--id", "id_column", help="The column of ids.  [default: the number of the row]")
@click.option("--keep", multiple=True, help="A column that goes along; may be given again.")
@click.option("--model", default="minilm", show_default=True, help="The model's name.")
@click.option(
    "--repository",
    envvar="ARROWHEAD_REPOSITORY",
    show_envvar=True,
    default="model_repository",
    show_default=True,
    help="Where it is converted; every machine must have it there.",
)
@click.option("--endpoint", default="", help="Ask Tritons that run, in place of computing here.")
@click.option("--prompt", help="Text put in front of each text.")
@click.option("--prompt-name", help="In place of it, the name of one of the model's prompts.")
@click.option(
    "--input-type",
    type=click.Choice(get_args(InputType)),
    help="In place of both, what the texts are.  [default: document]",
)
@click.option(
    "--truncate",
    type=click.Choice(["end", "none"]),
    default="end",
    show_default=True,
    help="What becomes of a text that is too long: its end is cut, or it is a bad row.",
)
@click.option("--dimensions", type=int, help="Cut the vectors to so many components (Matryoshka).")
@click.option("--normalize", is_flag=True, help="Scale the vectors to length 1.")
@click.option(
    "--precision",
    type=click.Choice(KINDS),
    default="float32",
    show_default=True,
    help="What components are stored as; binary and ubinary are 8 of them in a byte.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="What is computed in.")
@click.option(
    "--ray/--no-ray",
    "on_ray",
    default=None,
    help=f"On a Ray cluster, or in this process.  [default: --ray from {WORTH_RAY:,} rows on, but "
    "for one GPU]",
)
@click.option("--ray-address", default="", help="A cluster that runs.  [default: this machine]")
@click.option("--workers", type=click.IntRange(1), help="At most.  [default: a GPU or CPU each]")
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Of each worker.  [default: 1 on Ray, with a GPU its share of the cores; else all cores]",
)
@click.option(
    "--stall-after",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Seconds; a job on Ray that embeds nothing for so long is ended.",
)
@click.option("--restart", is_flag=True, help="Throw away what an unfinished job has left.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def embed(
    sources: tuple[str, ...],
    out: str,
    column: str,
    id_column: str | None,
    keep: tuple[str, ...],
    model: str,
    repository: str,
    endpoint: str,
    prompt: str | None,
    prompt_name: str | None,
    input_type: InputType | None,
    truncate: Any,
    dimensions: int | None,
    normalize: bool,
    precision: Kind,
    device: str,
    dtype: str,
    on_ray: bool | None,
    ray_address: str,
    workers: int | None,
    threads: int | None,
    stall_after: float,
    restart: bool,
    as_json: bool,
) -> None:
    """Embed the rows of SOURCES into Parquet files.

    SOURCES are files (.parquet, .jsonl, .csv, .tsv, the last three also packed), folders or
    patterns, here or on s3:// and gs://. OUT gets id, embedding, tokens, truncated and the kept
    columns, in files that DuckDB, pandas and Lance read; `_bad/` has the rows without a vector, and
    why.

    OUT appears when all is there. A job that was broken off, however that came about, goes on where
    it was when the same command is run again; so does one of which a file was damaged.

    \b
    Examples:
      arrowhead bulk embed 'corpus/*.parquet' --out vectors/
      arrowhead bulk embed dump.jsonl.gz --column body --id url --keep title --out vectors/
      arrowhead bulk embed s3://bucket/corpus --out s3://bucket/vectors --precision float16
      arrowhead bulk embed corpus/ --endpoint grpc://tritons:8001 --workers 8 --out vectors/
    """  # noqa: D301
    if prompt is None and prompt_name is None and input_type is None:
        input_type = "document"
    options = Options(prompt, prompt_name, input_type, truncate, dimensions, normalize)
    wish = Wish(
        sources,
        Columns(column, id_column, keep),
        out,
        Model(model, repository, 0, endpoint, device, dtype, threads or 0),
        options,
        precision,
    )
    address = ray_address or os.environ.get("RAY_ADDRESS", "")
    try:
        with planned(wish, restart=restart) as job:
            rows = job.task.corpus.rows
            if not job.is_new:
                click.echo(f"{out}: going on with what is there", err=True)
            with Progress(rows, len(job.units)) as progress:
                if on_ray is None:
                    on_ray = bool(address) or (rows >= WORTH_RAY and not _has_one_gpu(wish.model))
                if on_ray:
                    who = _on_ray(job, address, workers or 0, stall_after, progress)
                else:
                    who = _here(job, progress)
            told = report(job, progress.total, progress.seconds, who)
            job.publish(told)
    except OSError as error:
        raise BulkError(str(error)) from error
    click.echo(json.dumps(told) if as_json else in_words(told))


def _has_one_gpu(model: Model) -> bool:
    """Whether one worker has all that this machine computes with, or what was named of it."""
    if model.endpoint or model.device == "cpu" or not has_cuda():
        return False
    import torch

    return ":" in model.device or torch.cuda.device_count() == 1


def _here(job: Job, progress: Progress) -> dict[str, Any]:
    worker = Worker(job.task, progress.rows)
    for unit in job.units:
        progress.done(worker(unit))
    return {"engine": "one process"}


def _on_ray(
    job: Job, address: str, workers: int, stall_s: float, progress: Progress
) -> dict[str, Any]:
    from arrowhead_bulk.on_ray import Cluster, run_on_ray

    click.echo("starting on Ray", err=True)
    return run_on_ray(job, Cluster(address, workers, stall_s), progress)
