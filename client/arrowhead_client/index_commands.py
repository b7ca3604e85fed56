# SPDX-License-Identifier: Apache-2.0
"""`arrowhead index build`, `add`, `delete`, `info`, and `arrowhead search`."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from arrowhead_client import Client
from arrowhead_client._errors import IndexNotFound
from arrowhead_client._options import Options
from arrowhead_client._store import Store
from arrowhead_client.commands import RETRIES, url_option
from arrowhead_client.corpora import Corpus
from arrowhead_client.documents import MOST_HITS, Hit, Index

F = TypeVar("F", bound=Callable[..., Any])

_index_option = click.option(
    "--index",
    "path",
    envvar="ARROWHEAD_INDEX",
    show_envvar=True,
    type=click.Path(file_okay=False, path_type=Path),
    default="arrowhead_index",
    show_default=True,
    help="The folder of the index.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="JSON in place of the text.")


def _corpus_options(command: F) -> F:
    """What is read of a file of rows."""
    for option in (
        click.option(
            "--field",
            "fields",
            multiple=True,
            help="A column that becomes a field; may be given again. The default: all others.",
        ),
        click.option(
            "--text",
            multiple=True,
            default=("text",),
            show_default=True,
            help="The column of texts; given again, they are joined.",
        ),
        click.option("--id", "name", default="id", show_default=True, help="The column of ids."),
        click.argument("source", type=click.Path(exists=True, path_type=Path)),
    ):
        command = option(command)
    return command


@click.group()
def index() -> None:
    """Keep documents in a folder, to be searched by `arrowhead search`.

    \b
    Example:
      arrowhead index build notes/
      arrowhead search "how is tea made?"
    """  # noqa: D301 (click reads the character)


@index.command()
@_corpus_options
@_index_option
@url_option
@click.option("--model", help="The model's name.  [default: the index's, or minilm]")
@_json_option
def build(
    source: Path,
    name: str,
    text: tuple[str, ...],
    fields: tuple[str, ...],
    path: Path,
    url: str,
    model: str | None,
    as_json: bool,
) -> None:
    """Make an index of SOURCE, or bring one up to date with it.

    SOURCE is a file of rows (.parquet, .jsonl, .csv, .tsv), of which --id and --text choose the
    columns and the others become fields for `search --where`; or a folder of .txt and .md files,
    whose paths are their ids. Long texts are kept as several passages. Or it is what `arrowhead
    bulk embed --keep text` made: then nothing is embedded, and a row is one passage.

    Run it again after it was interrupted, or when SOURCE has changed: a text that is in the index
    is not embedded again. Documents that SOURCE has no longer stay; `arrowhead index delete`
    removes them.

    \b
    Examples:
      arrowhead index build notes/
      arrowhead index build papers.parquet --id doi --text title --text abstract --field year
      arrowhead index build vectors/
    """  # noqa: D301
    corpus = Corpus(source, name, text, fields or None)
    next(iter(corpus), None)  # what cannot be read must not leave an empty index
    try:
        model = model or _model(path)
    except IndexNotFound:
        model = "minilm"
    with Client(url, model=model, retries=RETRIES) as client:
        try:
            built = Index.open(path, client)
        except IndexNotFound:
            built = Index.create(path, client)
        _add(built, corpus, client, as_json)


@index.command()
@_corpus_options
@_index_option
@url_option
@_json_option
def add(
    source: Path,
    name: str,
    text: tuple[str, ...],
    fields: tuple[str, ...],
    path: Path,
    url: str,
    as_json: bool,
) -> None:
    """Add the documents of SOURCE to an index; those of the same id are replaced.

    SOURCE and its options are those of `arrowhead index build`; the model is the index's.

    \b
    Example:
      arrowhead index add more.jsonl
    """  # noqa: D301
    with Client(url, model=_model(path), retries=RETRIES) as client:
        corpus = Corpus(source, name, text, fields or None)
        _add(Index.open(path, client), corpus, client, as_json)


@index.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@_index_option
@_json_option
def delete(ids: tuple[str, ...], path: Path, as_json: bool) -> None:
    """Remove documents from an index. Needs no server.

    \b
    Example:
      arrowhead index delete notes/old.md 4414547
    """  # noqa: D301
    store = Store.open(path)
    removed, left = store.delete(ids), store.documents()
    if as_json:
        click.echo(json.dumps({"index": str(path), "deleted": removed, "documents": left}))
    else:
        click.echo(f"{path}: {removed} of {len(set(ids))} deleted, {left:,} left")


@index.command("info")
@_index_option
@_json_option
def info(path: Path, as_json: bool) -> None:
    """Tell what an index holds, and of which model. Needs no server.

    \b
    Example:
      arrowhead index info --json
    """  # noqa: D301
    store = Store.open(path)
    schema = store.schema
    facts: dict[str, Any] = {
        "index": str(path),
        **asdict(store.description),
        "documents": store.documents(),
        "passages": store.passages(),
        "bytes": store.size_bytes(),
        "fields": {field: str(schema.field(field).type) for field in store.fields},
    }
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    facts["fields"] = ", ".join(f"{k} ({v})" for k, v in facts["fields"].items()) or "none"
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else _printable(value)
        click.echo(f"{key:<13}{shown}")


@click.command()
@click.argument("query")
@_index_option
@click.option(
    "--limit",
    "-n",
    type=click.IntRange(1, MOST_HITS),
    default=10,
    show_default=True,
    help="How many documents at most.",
)
@click.option("--where", metavar="SQL", help='Only those that fit, such as "year > 2020".')
@url_option
@_json_option
def search(query: str, path: Path, limit: int, where: str | None, url: str, as_json: bool) -> None:
    """Find the documents of an index that are nearest to QUERY in meaning, the best first.

    A document's score is the cosine of QUERY with its best passage, of which a piece is shown. The
    model is the index's. --where is a condition over fields and id, in SQL: comparisons, AND, OR,
    NOT, IN, LIKE, IS NULL; dates as date '2024-01-31', lists by array_has(tags, 'a').

    \b
    Examples:
      arrowhead search "how is tea made?"
      arrowhead search "how is tea made?" --where "year > 2020 AND source = 'notes'" --json
    """  # noqa: D301
    with Client(url, model=_model(path), retries=RETRIES) as client:
        hits = Index.open(path, client).search(query, limit=limit, where=where)
    if as_json:
        told = {"query": query, "hits": [hit._asdict() for hit in hits]}
        click.echo(json.dumps(told, ensure_ascii=False, default=str))
        return
    width = shutil.get_terminal_size().columns
    for hit in hits:
        click.echo(_shown(hit, width))


def _model(path: Path) -> str:
    """The name of the model that an index is of."""
    return Store.open(path).description.model


def _add(built: Index, corpus: Corpus, client: Client, as_json: bool) -> None:
    if corpus.is_embedded:
        prompt = Options(input_type="document").prefix(client.prompts(), client.model)
        corpus.check_vectors(client.info().fingerprint, prompt or "")
    changed = built.add(corpus)
    told = {"index": str(built.path), "changed": changed, "documents": len(built)}
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(f"{built.path}: {changed:,} new or changed, {told['documents']:,} documents")


def _shown(hit: Hit, width: int) -> str:
    fields = "".join(f"  {name}={value}" for name, value in hit.fields.items())
    head = _printable(f"{hit.score:6.4f}  {hit.id}{fields}")
    if len(head) > width:
        head = f"{head[: width - 1]}…"
    indent = " " * 8
    snippet = _printable(hit.snippet)
    body = textwrap.fill(snippet, width, initial_indent=indent, subsequent_indent=indent)
    return f"{head}\n{body}" if snippet else head


def _printable(text: str) -> str:
    """Without what would steer a terminal: documents come from anywhere."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
