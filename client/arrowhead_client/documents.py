# SPDX-License-Identifier: Apache-2.0
"""Search: documents, their vectors in a folder, and the nearest to a query.

Document -> _passages.py (what the model reads at once) -> Client.embed -> _store.py (LanceDB)
query    -> Client.embed -> _store.py -> a document's best passage -> _snippet.py -> Hit
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from arrowhead_client._arrow import to_arrow
from arrowhead_client._client import Client
from arrowhead_client._errors import InvalidInput, OtherModel
from arrowhead_client._filter import check_filter
from arrowhead_client._options import Options, check_whole
from arrowhead_client._passages import split
from arrowhead_client._rows import column, new_fields
from arrowhead_client._snippet import snippet
from arrowhead_client._store import (
    HASH,
    HASH_BYTES,
    ID,
    OWN,
    PART,
    TEXT,
    VECTOR,
    Description,
    Store,
)

MOST_HITS = 10_000
_BATCH = 512  # documents in one commit; a process that is killed loses no more
_BATCH_CHARS = 4_000_000
_TIDY_AFTER = 100  # batches
_STEP = 128  # passages between two moves of the progress bar
_LONGEST_ID = 1024  # bytes
_CHECK_S = 1.0  # a model that is replaced on the server is noticed so soon
_PASSAGES_A_HIT = 3  # looked at, to begin with: several may be of one document


class Document(NamedTuple):
    """What is searched.

    Attributes:
        id: names it; a document of the same id replaces it.
        text: what is embedded, and what a snippet is taken from.
        fields: what else is known of it, by name: strings, numbers, booleans, dates, lists of
            these, or None. A filter may ask for them; each hit brings them. Decimals are kept as
            float64. The first value of a name that tells a type decides on that of the others.
        vector: float [D] of the whole text, where it was made before by the index's model, as
            `arrowhead bulk embed` does; then the text is one passage, and nothing is embedded.
    """

    id: str
    text: str
    fields: Mapping[str, Any] = MappingProxyType({})
    vector: npt.NDArray[Any] | None = None


class Hit(NamedTuple):
    """A document that was found.

    Attributes:
        id: the document's.
        score: the cosine of the query with its best passage, -1..1.
        snippet: the piece of that passage that has most of the query's words, on one line.
        fields: the document's, without those that it has not.
    """

    id: str
    score: float
    snippet: str
    fields: dict[str, Any]


class Index:
    """Documents and their vectors in a folder. May be shared by threads.

    >>> with Client() as client:  # doctest: +SKIP
    ...     index = Index.create("notes.index", client)
    ...     index.add([Document("a", "Tea is made of leaves.", {"year": 2021})])
    ...     index.search("how is tea made?", where="year > 2020")
    [Hit(id='a', score=0.71, snippet='Tea is made of leaves.', fields={'year': 2021})]

    A long text is kept as several passages; a document scores what its best passage does. Searching
    is exact up to 20,000 passages; above, an index of vectors finds nearly all of what is nearest
    (perf/results/search.md, up to 200,000). Up to some 260,000 passages it still looks at each of
    them, and saves by reading one byte a component of it; above, it looks at a part only.

    One process writes at a time; any number search meanwhile, and see each commit at once.
    """

    def __init__(self, store: Store, client: Client) -> None:
        self._store = store
        self._client = client
        self._description = store.description
        self._checked_s = -np.inf

    @classmethod
    def create(cls, path: str | Path, client: Client) -> Index:
        """An empty index in a folder, which is made if need be, for the model that `client` asks.

        Raises:
            NotInstalled: LanceDB is not installed.
            IndexExists: there is one already.
            IndexBusy: another process is making it.
            IndexFailed: the folder cannot be made or written to.
            ServerError: the model cannot be asked what it is.
        """
        info = client.info()
        description = Description(client.model, info.fingerprint, info.dimension)
        return cls(Store.create(Path(path), description), client)

    @classmethod
    def open(cls, path: str | Path, client: Client) -> Index:
        """The index in a folder.

        Raises:
            NotInstalled: LanceDB is not installed.
            IndexNotFound: there is none.
            IndexDamaged: it cannot be read.
            OtherModel: its vectors are of another model than the one that `client` asks.
            ServerError: the model cannot be asked what it is.
        """
        index = cls(Store.open(Path(path)), client)
        index._check_model()
        return index

    @property
    def path(self) -> Path:
        """The folder."""
        return self._store.path

    def add(self, documents: Iterable[Document], *, progress: bool | None = None) -> int:
        """Adds documents, or replaces those of the same id; how many were new or changed.

        They are read and written in batches, each one commit. What was committed stays when a later
        batch fails or the process is killed; given the same documents again, nothing whose text is
        in the index already is embedded. Of documents of one id the last counts.

        Args:
            documents: read once, batch by batch.
            progress: a bar on stderr: True or False; None shows it on a terminal.

        Raises:
            InvalidInput: an id, a text or a field is not as `Document` says.
            IndexBusy: another process is writing.
            OtherModel: the server gives vectors of another model by now.
            ServerError: as for `Client.embed`.
        """
        changed, due = 0, _TIDY_AFTER
        with self._store.writing(), _bar(documents, progress) as bar:
            self._check_model()
            for number, (batch, seen) in enumerate(_batches(documents), 1):
                changed += self._add(batch, bar)
                bar.update(seen)
                if number == due:  # ever rarer, or a long stream would be rewritten time and again
                    self._store.tidy()
                    due *= 2
            self._store.tidy()
        return changed

    def delete(self, ids: Sequence[str]) -> int:
        """Removes documents by id; how many of them there were.

        Raises:
            InvalidInput: an id is no string.
            IndexBusy: another process is writing.
        """
        if isinstance(ids, str) or not all(isinstance(one, str) for one in ids):
            raise InvalidInput(f"ids={ids!r:.80}: wanted a list of strings")
        return self._store.delete(ids)

    def search(self, query: str, *, limit: int = 10, where: str | None = None) -> list[Hit]:
        """The documents nearest to a query, the best first.

        Args:
            query: embedded with the model's prompt for queries, if it has one.
            limit: hits wanted, at most 10,000; there are fewer if so few documents fit.
            where: only among those that fit this condition over their fields and `id`, in SQL, such
                as `"year > 2020 AND source = 'notes'"`. It may call those functions that are in
                `_filter.FUNCTIONS`.

        Raises:
            InvalidInput: the query is no string, `limit` is out of its range, or the condition
                cannot be read.
            OtherModel: the server gives vectors of another model by now.
            ServerError: as for `Client.embed`.
        """
        check_whole("limit", limit, 1, MOST_HITS)
        if not isinstance(query, str):
            raise InvalidInput(f"query={query!r:.80}: wanted a string")
        if where is not None:
            check_filter(where)
        vector = self._client.embed(query, input_type="query")
        if time.monotonic() - self._checked_s > _CHECK_S:
            self._check_model()
        take = _PASSAGES_A_HIT * limit
        while True:
            rows = self._store.search(vector, take, where)
            best: dict[str, dict[str, Any]] = {}
            for row in rows:
                best.setdefault(row[ID], row)
            if len(best) >= limit or len(rows) < take:
                return [_hit(row, query) for row in list(best.values())[:limit]]
            take *= 4

    def __len__(self) -> int:
        """How many documents there are."""
        return self._store.documents()

    def _check_model(self) -> None:
        met, wanted = self._client.info(), self._description
        if met.fingerprint != wanted.fingerprint:
            raise OtherModel(
                f"{self.path} was made with model {wanted.model!r} (fingerprint "
                f"{wanted.fingerprint}), and {met.name!r} as it is served now (fingerprint "
                f"{met.fingerprint}) is another: their vectors are not comparable. Ask that model, "
                "or build an index of this one in another folder"
            )
        self._checked_s = time.monotonic()

    def _add(self, batch: Mapping[str, Document], bar: tqdm[Any]) -> int:
        """One commit; how many documents it changed."""
        prompt = Options(input_type="document").prefix(self._client.prompts(), "") or ""
        hashes = {name: _hash(prompt, document) for name, document in batch.items()}
        known = self._store.fields
        fields, added = self._fields(batch)
        wanted = {row.pop(ID): row for row in fields.to_pylist()}
        lacking = {field.name: None for field in added}
        there = {
            row.pop(ID): (row.pop(HASH), row | lacking)
            for row in self._store.rows(list(batch), [ID, HASH, *known], f"{PART} = 0").to_pylist()
        }
        changed = [name for name in batch if there.get(name) != (hashes[name], wanted[name])]
        if not changed:
            return 0
        # Of the others only fields have changed: they keep their passages, and the vectors of them.
        new = [name for name in changed if name not in there or there[name][0] != hashes[name]]
        kept = [name for name in changed if name not in new]
        rows = pa.concat_tables(
            [
                self._embedded({name: batch[name] for name in new}, prompt, hashes, bar),
                self._store.rows(kept, OWN),
            ],
            promote_options="permissive",
        )
        place = {name: number for number, name in enumerate(batch)}
        fields = fields.take(pa.array(place[name] for name in rows[ID].to_pylist()))
        self._check_model()  # these vectors are of another, had it been replaced meanwhile
        if added:
            self._store.add_fields(added)  # not before: columns cannot be taken back
        schema = self._store.schema
        columns = [(rows if name in OWN else fields)[name] for name in schema.names]
        self._store.put(
            pa.Table.from_arrays(columns, schema=schema),
            [name for name in changed if name in there],
        )
        return len(changed)

    def _fields(self, batch: Mapping[str, Document]) -> tuple[pa.Table, list[pa.Field]]:
        """The ids and fields of these documents, and the columns that the index lacks for them."""
        fields = {name: document.fields for name, document in batch.items()}
        known = [field for field in self._store.schema if field.name not in OWN]
        added = new_fields(fields, [field.name for field in known])
        columns = {ID: pa.array(batch, pa.string())}
        for field in (*known, *added):
            columns[field.name] = column(field.name, field.type, fields)
        return pa.table(columns), added

    def _embedded(
        self,
        documents: Mapping[str, Document],
        prompt: str,
        hashes: Mapping[str, bytes],
        bar: tqdm[Any],
    ) -> pa.Table:
        """The rows, without fields, of the passages of these documents, by id."""
        given = {n: d.vector for n, d in documents.items() if d.vector is not None}
        texts = {name: one.text for name, one in documents.items() if name not in given}
        passages = split(self._client, list(texts.values()), prompt)
        passages += [[documents[name].text] for name in given]
        flat = [one for several in passages for one in several]
        names = [
            name for name, several in zip([*texts, *given], passages, strict=True) for _ in several
        ]
        vectors = [np.empty((0, self._description.dimension), np.float32)]
        end = len(flat) - len(given)
        for start in range(0, end, _STEP):
            step = flat[start : min(start + _STEP, end)]
            vectors.append(self._client.embed(step, prompt=prompt, progress=False))
            bar.set_postfix_str(f"passage {start + len(step)} of {len(flat)}")
        vectors += [self._given(name, vector) for name, vector in given.items()]
        return pa.table(
            {
                ID: pa.array(names, pa.string()),
                TEXT: pa.array(flat, pa.string()),
                PART: pa.array(
                    [n for several in passages for n in range(len(several))], pa.int32()
                ),
                HASH: pa.array([hashes[name] for name in names], pa.binary(HASH_BYTES)),
                VECTOR: to_arrow(np.concatenate(vectors)),
            }
        )

    def _given(self, name: str, vector: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """[1, D] of a vector that a document brought."""
        found = np.asarray(vector, np.float32)
        if found.shape != (self._description.dimension,) or not np.isfinite(found).all():
            raise InvalidInput(
                f"document {name!r:.80}: a vector of shape {found.shape}: wanted "
                f"({self._description.dimension},), all finite"
            )
        return found[None]


def _batches(documents: Iterable[Document]) -> Iterator[tuple[dict[str, Document], int]]:
    """Documents by id, in batches, with how many were read for each."""
    batch: dict[str, Document] = {}
    seen = chars = 0
    for document in documents:
        _check(document)
        batch.pop(document.id, None)  # the last one counts
        batch[document.id] = document
        seen += 1
        chars += len(document.text)
        if seen >= _BATCH or chars >= _BATCH_CHARS:
            yield batch, seen
            batch, seen, chars = {}, 0, 0
    if batch:
        yield batch, seen


def _check(document: Document) -> None:
    """Refuses what cannot be stored, before anything of its batch is embedded."""
    name, text, fields, _ = document
    if not (isinstance(name, str) and isinstance(text, str) and isinstance(fields, Mapping)):
        raise InvalidInput(
            f"document {name!r:.80} with text {text!r:.40} and fields {fields!r:.40}: wanted two "
            "strings and a mapping"
        )
    try:
        size = len(name.encode())
        text.encode()
        "".join(map(str, fields)).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"document {name!r:.80} cannot be written as UTF-8: {error}") from error
    if not 0 < size <= _LONGEST_ID:
        raise InvalidInput(f"id {name!r:.80} has {size} bytes: wanted 1..{_LONGEST_ID}")
    for field in fields:
        if not _is_name(field):
            raise InvalidInput(
                f"document {name!r:.80}: a field cannot be called {field!r:.80}: wanted a name "
                "that is not empty, without a full stop or a backtick, that does not begin with _ "
                f"and is neither {ID!r} nor {TEXT!r}; --field chooses a file's columns"
            )


def _is_name(field: object) -> bool:
    """Whether a column may be called so; a wrong one would make the whole table unreadable."""
    return (
        isinstance(field, str)
        and field not in OWN
        and field.strip() != ""
        and not field.startswith("_")
        and not set(".`") & set(field)
    )


def _hash(prompt: str, document: Document) -> bytes:
    """Of what decides on a document's passages and their vectors."""
    given = b"" if document.vector is None else document.vector.tobytes()
    told = (prompt + document.text).encode() + given
    return hashlib.blake2b(told, digest_size=HASH_BYTES).digest()


def _hit(row: dict[str, Any], query: str) -> Hit:
    score = float(np.clip(1 - row.pop("_distance"), -1, 1))
    name, text = row.pop(ID), row.pop(TEXT)
    fields = {field: value for field, value in row.items() if value is not None}
    return Hit(name, score, snippet(text, query), fields)


def _bar(documents: Iterable[Document], progress: bool | None) -> tqdm[Any]:
    return tqdm(
        total=length_hint(documents) or None,
        desc="index",
        unit="document",
        disable=None if progress is None else not progress,
        leave=progress is True,
    )
