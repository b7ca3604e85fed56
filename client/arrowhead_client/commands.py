# SPDX-License-Identifier: Apache-2.0
"""`arrowhead embed`, `arrowhead similarity` and `arrowhead info`."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import click
import numpy as np

from arrowhead_client import Client
from arrowhead_client._algebra import Vectors
from arrowhead_client._plan import to_arrow
from arrowhead_client._url import DEFAULT_URL

F = TypeVar("F", bound=Callable[..., Any])


url_option = click.option(
    "--url",
    envvar="ARROWHEAD_URL",
    show_envvar=True,
    default=DEFAULT_URL,
    show_default=True,
    help="The server: grpc://host:port or http://host:port.",
)


def _server_options(function: F) -> F:
    model = click.option("--model", default="minilm", show_default=True, help="The model's name.")
    return url_option(model(function))


RETRIES = 4  # 1.5 s: somebody waits at the prompt for "no server answers"

_file_option = click.option(
    "--file", "-f", type=click.File("rb"), help="One text a line, UTF-8; - is stdin."
)


@click.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@_file_option
@_server_options
@click.option("--prompt", help='Put in front of each text, such as "query: ".')
@click.option("--prompt-name", help='In place of --prompt: one the model brings, such as "query".')
@click.option("--dimensions", type=int, help="Cut the vectors to so many components (Matryoshka).")
@click.option("--normalize", is_flag=True, help="Scale the vectors to length 1.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "npy", "parquet"]),
    default="jsonl",
    show_default=True,
    help="What to write.",
)
@click.option(
    "--out",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file, all or nothing; the default is stdout.",
)
def embed(
    texts: tuple[str, ...],
    file: IO[bytes] | None,
    url: str,
    model: str,
    prompt: str | None,
    prompt_name: str | None,
    dimensions: int | None,
    normalize: bool,
    form: str,
    out: Path | None,
) -> None:
    """Turn texts into vectors.

    Texts are arguments, or the lines of a file or of stdin: line i is vector i, empty lines too.

    \b
    Examples:
      arrowhead embed "a text" "another"
      arrowhead embed --file corpus.txt --format parquet --out corpus.parquet
      cat corpus.txt | arrowhead embed --format npy > corpus.npy
      arrowhead embed --prompt "query: " --dimensions 128 "what is a neutron star"
      arrowhead embed --model e5 --prompt-name query "what is a neutron star"
    """  # noqa: D301 (click reads the character)
    if out is None and form != "jsonl" and sys.stdout.isatty():
        raise click.UsageError(f"{form} is binary: not written to a terminal; give --out FILE")
    lines = _texts(texts, file)
    with Client(url, model=model, retries=RETRIES) as client:
        vectors = client.embed(
            lines,
            prompt=prompt,
            prompt_name=prompt_name,
            dimensions=dimensions,
            normalize=normalize,
        )
    with _output(out) as stream:
        _WRITERS[form](stream, lines, vectors)


@click.command()
@click.argument("a", metavar="A")
@click.argument("others", metavar="B...", nargs=-1)
@_file_option
@_server_options
@click.option("--json", "as_json", is_flag=True, help="JSON in place of the list.")
def similarity(
    a: str,
    others: tuple[str, ...],
    file: IO[bytes] | None,
    url: str,
    model: str,
    as_json: bool,
) -> None:
    """Rank texts by how much they are like A: the cosine of their vectors, the highest first.

    \b
    Examples:
      arrowhead similarity "a cat" "a kitten" "a tractor"
      arrowhead similarity "a cat" --file sentences.txt | head
      arrowhead similarity --json "a cat" "a kitten"
    """  # noqa: D301
    texts = _texts(others, file)
    with Client(url, model=model, retries=RETRIES) as client:
        scores = client.similarity(a, texts)[0] if texts else np.empty(0, np.float32)
    ranked = [(texts[index], float(scores[index])) for index in np.argsort(-scores, kind="stable")]
    if as_json:
        results = [{"text": text, "similarity": round(score, 6)} for text, score in ranked]
        click.echo(json.dumps({"text": a, "results": results}, ensure_ascii=False))
    else:
        for text, score in ranked:
            click.echo(f"{score:7.4f}  {text}")


@click.command()
@click.argument("name", default="minilm")
@url_option
@click.option("--json", "as_json", is_flag=True, help="JSON in place of the list.")
def info(name: str, url: str, as_json: bool) -> None:
    """Tell what the served model NAME is: sizes, prompts, certificate.

    \b
    Examples:
      arrowhead info
      arrowhead info e5 --json
    """  # noqa: D301
    with Client(url, model=name, retries=RETRIES) as client:
        told = client.info()
    facts: dict[str, Any] = {
        "model": told.name,
        "version": told.version,
        "dimension": told.dimension,
        "max_seq_length": told.max_seq_length,
        "pooling": told.pooling,
        "normalize": told.normalize,
        "prompts": dict(told.prompts),
        "int8": "calibrated" if told.ranges is not None else "convert again",
        "fingerprint": told.fingerprint,
        "certificate": dict(told.certificate),
    }
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    proof = facts.pop("certificate")
    facts["certificate"] = (
        f"cosine {proof['worst_cosine']:.7f} worst, {proof['mean_cosine']:.7f} mean over "
        f"{proof['texts']} texts"
    )
    facts["prompts"] = ", ".join(f"{key}: {text!r}" for key, text in told.prompts.items()) or "none"
    for key, value in facts.items():
        click.echo(f"{key:<16}{value}")


def _texts(arguments: Sequence[str], file: IO[bytes] | None) -> list[str]:
    """The texts of the arguments, of the file, or of a stdin that is no terminal."""
    if arguments and file is not None:
        raise click.UsageError("texts as arguments and --file: give one of them")
    if arguments:
        return list(arguments)
    stdin = sys.stdin.buffer
    if file is None and stdin.isatty():
        raise click.UsageError("no texts: give them as arguments, with --file, or on stdin")
    lines = (file or stdin).read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end is no line
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise click.ClickException(
                f"line {number} is not UTF-8 (byte {error.start}: {line[error.start]:#04x}): "
                "convert the file, for example with iconv"
            ) from error
    return texts


def _write_jsonl(stream: IO[bytes], texts: Sequence[str], vectors: Vectors) -> None:
    for text, vector in zip(texts, vectors, strict=True):
        # Nine digits give each float32 back exactly; the float64 it became would show seventeen.
        numbers = [float(f"{number:.9g}") for number in vector.tolist()]
        line = json.dumps({"text": text, "embedding": numbers}, ensure_ascii=False)
        stream.write(line.encode() + b"\n")


def _write_npy(stream: IO[bytes], texts: Sequence[str], vectors: Vectors) -> None:
    np.save(stream, vectors, allow_pickle=False)


def _write_parquet(stream: IO[bytes], texts: Sequence[str], vectors: Vectors) -> None:
    import pyarrow as pa  # heavy, and only this format wants it
    import pyarrow.parquet as pq

    table = pa.table({"text": pa.array(texts, pa.string()), "embedding": to_arrow(vectors)})
    buffer = io.BytesIO()  # Parquet asks a stream for its position; a pipe has none
    pq.write_table(table, buffer)
    stream.write(buffer.getbuffer())


_WRITERS: dict[str, Callable[[IO[bytes], Sequence[str], Vectors], None]] = {
    "jsonl": _write_jsonl,
    "npy": _write_npy,
    "parquet": _write_parquet,
}


@contextmanager
def _output(out: Path | None) -> Iterator[IO[bytes]]:
    """Stdout, or a sibling of `out` that takes its name when all is written."""
    if out is None:
        stream = sys.stdout.buffer
        yield stream
        stream.flush()
        return
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with draft.open("xb") as file:
            yield file
        draft.replace(out)
    except OSError as error:
        raise click.ClickException(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
