# SPDX-License-Identifier: Apache-2.0
"""One unit after the other: read, tokenize, embed, write. The same wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrowhead_bulk import parts
from arrowhead_bulk.corpus import Columns, Corpus, Unit
from arrowhead_bulk.errors import BadCorpus, BadModel, BulkError
from arrowhead_bulk.parts import Done, Folder, PartWriter
from arrowhead_bulk.reading import TOO_LONG, BadRow, Batch, Reader
from arrowhead_bulk.vectors import Embedding, Model
from arrowhead_client import ModelInfo, Options, TimedOut, Unavailable
from arrowhead_client._arrow import to_arrow
from arrowhead_client._bulk_format import EMBEDDING, TOKENS, TRUNCATED

T = TypeVar("T")
Kind = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
KINDS = get_args(Kind)
_PAUSES_S = (1.0, 5.0, 15.0)


@dataclass(frozen=True)
class Task:
    """All that a worker must know; goes to other machines as it is.

    Attributes:
        corpus, columns: what is read.
        model, info: what embeds, and what it was when the job was planned.
        options: what is wanted of texts and vectors; their precision is `kind`'s.
        kind: what components are stored as.
        staging, out: where parts are written, and where they are published.
        key: names the job: the same of the same rows, model and options.
    """

    corpus: Corpus
    columns: Columns
    model: Model
    info: ModelInfo
    options: Options
    kind: Kind
    staging: str
    out: str
    key: str

    @property
    def prefix(self) -> str:
        """What is put in front of each text."""
        return self.options.prefix(self.info.prompts, self.info.name) or ""

    def finished(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Vectors [N, D] of the model as they are stored."""
        edge = self.options.edge(self.info.ranges if self.options.needs_ranges else None)
        done = edge(vectors)
        return done.astype(np.float16) if self.kind == "float16" else done

    @property
    def schema(self) -> pa.Schema:
        """Of all parts."""
        sample = self.finished(np.zeros((1, self.info.dimension), np.float32))
        told = {
            "fingerprint": self.info.fingerprint,
            "model": self.info.name,
            "dimension": self.info.dimension,
            "dimensions": self.options.dimensions or self.info.dimension,
            "precision": self.kind,
            "computed_in": self.model.dtype,
            "prompt": self.prefix,
            "truncate": self.options.truncate,
            "normalize": self.options.normalize or self.info.normalize,
            "max_seq_length": self.info.max_seq_length,
            "job": self.key,
        }
        return parts.schema(self.corpus.carried, self.columns.id, parts.list_of(sample), told)


class _Tokenized(NamedTuple):
    batch: Batch
    ids: list[list[int]]
    truncated: list[bool]


class Worker:
    """Does units.

    Args:
        task: the job.
        on_batch: told after each batch how many rows were done, and of how many tokens.

    Raises:
        BadModel: the model cannot be opened, or is not the one that the job began with.
    """

    def __init__(
        self, task: Task, on_batch: Callable[[int, int], object] = lambda rows, tokens: None
    ) -> None:
        self._task, self._on_batch = task, on_batch
        self._schema = task.schema
        self._staging, self._out = Folder(task.staging), Folder(task.out)
        self._open: Embedding | None = None
        self._reader = Reader(task.corpus, task.columns)
        self._ahead = ThreadPoolExecutor(1, "read")

    def __call__(self, unit: Unit) -> Done:
        """Does a unit, unless that was done; safe to be called twice.

        What may pass is tried again: a store or a server that does not answer for a moment.

        Raises:
            BulkError: any of its kinds.
            ServerError: an endpoint's.
        """
        for pause_s in _PAUSES_S:
            try:
                return self._done(unit)
            except (OSError, Unavailable, TimedOut):
                time.sleep(pause_s)
        try:
            return self._done(unit)
        except OSError as error:
            raise BulkError(f"{parts.name_of(unit)}: {error}") from error

    def _done(self, unit: Unit) -> Done:
        folders = (self._staging, self._out)
        if (done := parts.found(folders, unit, self._schema, wholly=True)) is not None:
            return done
        with PartWriter(self._staging, unit, self._schema) as part:
            for batch, ids, truncated in self._one_ahead(self._tokenized(unit)):
                table = self._table(batch, ids, truncated)
                part.add(table, batch.bad, batch.blank)
                self._on_batch(len(batch), sum(map(len, ids)))
            if part.done.seen != unit.rows:
                raise BadCorpus(
                    f"{parts.name_of(unit)}: {part.done.seen} rows were read, {unit.rows} were "
                    "there when the job was planned"
                )
        return part.done

    @property
    def embedding(self) -> Embedding:
        """The model; opened when it is needed, for a job that is done needs none."""
        if self._open is None:
            self._open = self._task.model.open(self._task.info)
            met, wanted = self._open.info.fingerprint, self._task.info.fingerprint
            if met != wanted:
                raise BadModel(
                    f"the model {self._task.model.name!r} is another than when the job began "
                    f"(fingerprint {met}, wanted {wanted}): serve that one, or begin anew with "
                    "--restart"
                )
        return self._open

    def _tokenized(self, unit: Unit) -> Iterator[_Tokenized]:
        task = self._task
        prefix, limit = task.prefix, self.embedding.info.max_seq_length
        for batch in self._reader(unit):
            ids, truncated = self.embedding.tokenizer.encode([prefix + one for one in batch.texts])
            if task.options.truncate == "none" and any(truncated):
                why = f"more than the {limit} tokens that the model reads"
                long = {
                    row: BadRow(*batch.places[row], TOO_LONG, why)
                    for row, is_long in enumerate(truncated)
                    if is_long
                }
                ids = [one for row, one in enumerate(ids) if row not in long]
                yield _Tokenized(batch.without(long), ids, [False] * len(ids))
            else:
                yield _Tokenized(batch, ids, truncated)

    def _table(self, batch: Batch, ids: list[list[int]], truncated: list[bool]) -> pa.Table:
        task = self._task
        vectors = (
            self.embedding.vectors(ids) if ids else np.empty((0, task.info.dimension), np.float32)
        )
        kept = dict(zip(task.columns.carried, batch.carried, strict=True))
        columns = kept | {
            parts.ID: kept[task.columns.id]
            if task.columns.id
            else pa.array(batch.numbers, pa.int64()),
            EMBEDDING: to_arrow(task.finished(vectors)),
            TOKENS: pa.array(map(len, ids), pa.int32()),
            TRUNCATED: pa.array(truncated, pa.bool_()),
        }
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)

    def _one_ahead(self, items: Iterator[T]) -> Iterator[T]:
        """The items, each made while the one before is used."""
        end = object()
        coming = self._ahead.submit(partial(next, items, end))
        while (item := coming.result()) is not end:
            coming = self._ahead.submit(partial(next, items, end))
            yield item
