# SPDX-License-Identifier: Apache-2.0
"""A job: planned, done unit by unit, verified, published; and gone on with after anything.

    `planned`         makes .OUT.staging, with `_job.json`, which names the job
    units are done    each appears there as one file (work.py)
    `publish`         all files are looked at, counted, and .OUT.staging becomes OUT

`_SUCCESS` in OUT tells that all is there. On one filesystem OUT appears at one moment; an object
store knows no such moment, so there `_SUCCESS` comes last, and readers wait for it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arrowhead_bulk import parts
from arrowhead_bulk.corpus import Columns, Corpus, Unit, survey
from arrowhead_bulk.errors import BadCorpus, BulkError, Incomplete, OtherJob
from arrowhead_bulk.parts import Done, Folder
from arrowhead_bulk.vectors import Model
from arrowhead_bulk.work import Kind, Task
from arrowhead_client import InvalidInput, Options
from arrowhead_client._bulk_format import JOB, SUCCESS

REPORT = "_report.json"
_LOOKS_AT_ONCE = 16


@dataclass(frozen=True)
class Wish:
    """What the caller wants.

    Attributes:
        sources: of rows; see `corpus.survey`.
        columns: of these.
        out: where the vectors go: a folder that is not there, or a URI.
        model, options: what embeds, and how; but for the options' precision:
        kind: what components are stored as.
    """

    sources: tuple[str, ...]
    columns: Columns
    out: str
    model: Model
    options: Options = field(default_factory=Options)
    kind: Kind = "float32"


@dataclass
class Total:
    """What came of all units.

    Attributes:
        rows, bad, blank, tokens, truncated: as of `Done`.
        units: how many there are. found: how many of them were done before.
        found_rows, found_tokens: of these.
    """

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    tokens: int = 0
    truncated: int = 0
    units: int = 0
    found: int = 0
    found_rows: int = 0
    found_tokens: int = 0

    @property
    def seen(self) -> int:
        """Rows of these units, whatever became of them."""
        return self.rows + self.bad.total() + self.blank

    @property
    def own_rows(self) -> int:
        """Those of them that were not done before."""
        return self.seen - self.found_rows

    @property
    def own_tokens(self) -> int:
        """The tokens of these."""
        return self.tokens - self.found_tokens

    def add(self, done: Done) -> None:
        """One more unit."""
        self.rows += done.rows
        self.bad += done.bad
        self.blank += done.blank
        self.tokens += done.tokens
        self.truncated += done.truncated
        self.units += 1
        if done.was_there:
            self.found += 1
            self.found_rows += done.seen
            self.found_tokens += done.tokens


class Job:
    """A job in its folders.

    Attributes:
        task: what workers are told.
        is_new: whether nothing had been done before.
    """

    def __init__(self, task: Task, *, is_new: bool) -> None:
        self.task, self.is_new = task, is_new
        self._staging, self._out = Folder(task.staging), Folder(task.out)
        self._schema = task.schema

    @property
    def units(self) -> tuple[Unit, ...]:
        """All of them."""
        return self.task.corpus.units

    def publish(self, report: dict[str, Any]) -> None:
        """Puts all parts in their place, once they are proved to be there.

        Args:
            report: what is to be told of the job; its counts are proved too.

        Raises:
            Incomplete: a part is missing or torn, or the counts are not those of the corpus.
        """
        total = Total()
        for done in self._looked_at():
            total.add(done)
        if total.seen != self.task.corpus.rows or total.rows != report["rows"]:
            raise Incomplete(
                f"{total.seen} rows and {total.rows} vectors are there, wanted "
                f"{self.task.corpus.rows} and {report['rows']}: run the same command again"
            )
        self._staging.tidy()
        if self._staging.names() == [JOB]:  # it was published before
            self._out.write(SUCCESS, b"")
            return
        self._staging.write(REPORT, json.dumps(report, indent=2).encode())
        if self._out.is_local and not any(Path(self._out.path).glob("*")):
            self._staging.write(SUCCESS, b"")
            Path(self._staging.path).rename(self._out.path)  # over an empty folder, too
            return
        # First whose it is, last that it is whole: broken off in between, it is gone on with.
        self._out.make()
        self._out.write(JOB, self._staging.read(JOB) or b"")
        for name in self._staging.names():
            if name != JOB:
                self._staging.move_to(self._out, name)
        self._out.write(SUCCESS, b"")
        self._staging.filesystem.delete_dir(self._staging.path)

    def has(self, done: Done) -> bool:
        """Whether a unit's part is where it should be, as far as its end tells."""
        return self._seen(self.units[done.number]) is not None

    def _looked_at(self) -> Iterator[Done]:
        def look(unit: Unit) -> Done:
            if (found := self._seen(unit)) is None:
                raise Incomplete(
                    f"{parts.name_of(unit)} is not in {self.task.staging}, or not whole: run the "
                    "same command again"
                )
            return found

        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:
            yield from threads.map(look, self.units)

    def _seen(self, unit: Unit) -> Done | None:
        return parts.found((self._staging, self._out), unit, self._schema, wholly=False)


@contextmanager
def planned(wish: Wish, *, restart: bool = False) -> Iterator[Job]:
    """The job, new or gone on with; nobody else works on it meanwhile, from this filesystem.

    Args:
        wish: what is wanted.
        restart: throws away what was done of it, or of another that was not finished.

    Raises:
        BadCorpus: it cannot be read.
        BadModel: there is none.
        InvalidInput: the model has not what the options ask for.
        OtherJob: there is something else in `out`, or somebody at work.
    """
    uri = wish.out if "://" in wish.out else str(Path(wish.out).absolute())
    staging, out = _staging(uri), Folder(uri)
    _check_place(out)
    precision = "float32" if wish.kind == "float16" else wish.kind
    options = replace(wish.options, precision=precision)
    if options.truncate == "start":
        raise InvalidInput("truncate='start': wanted 'end' or 'none'")
    if taken := [name for name in wish.columns.keep if name in parts.OWN]:
        raise BadCorpus(f"--keep {taken[0]}: a column of the output is called so")
    with ExitStack() as held:
        if out.is_local:
            _lock(held, out)
        folder = Folder(staging)
        begun = {} if restart else _plan_of(folder)
        model = replace(wish.model, repository=str(Path(wish.model.repository).absolute()))
        if not model.endpoint and begun.get("model") == model.name:
            model = replace(model, version=begun["version"])  # what is begun, is ended
        info = model.told()
        model = replace(model, version=info.version)  # whatever goes live meanwhile
        corpus = survey(wish.sources, wish.columns)
        key = _key(corpus, wish.columns, model, info.fingerprint, options, wish.kind)
        task = Task(corpus, wish.columns, model, info, options, wish.kind, staging, uri, key)
        _ = task.prefix, task.schema  # what the model has not is told before anything is made
        is_new = not _is_ours(out, key)
        if restart and folder.names():
            folder.filesystem.delete_dir(folder.path)
        is_new &= not _is_ours(folder, key)
        folder.make()
        folder.write(JOB, json.dumps(_told(task), indent=1).encode())
        held.callback(_remove_plan, folder, out)
        yield Job(task, is_new=is_new)


def _check_place(out: Folder) -> None:
    """Refuses a folder that cannot be put in its place by renaming one beside it."""
    if Path(out.path or "/").is_mount() if out.is_local else "/" not in out.path:
        raise BulkError(f"{out.uri} is a whole volume or bucket: name a folder in it")


def _remove_plan(folder: Folder, out: Folder) -> None:
    """Of a job that is published, and of which no part had to be done again."""
    if folder.names() == [JOB] and _plan_of(out):
        folder.filesystem.delete_dir(folder.path)


def _staging(uri: str) -> str:
    """Beside OUT, hidden: on the same filesystem."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    head, slash, tail = base.rstrip("/").rpartition("/")
    return f"{head}{slash}.{tail}.staging{mark}{query}"


def _lock(held: ExitStack, out: Folder) -> None:
    head, _, tail = out.path.rpartition("/")
    Path(head).mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{head}/.{tail}.lock", timeout=0)
    try:
        held.enter_context(lock)
    except Timeout as error:
        raise OtherJob(f"{out.uri}: another process is at work there; wait for its end") from error
    held.callback(Path(lock.lock_file).unlink, missing_ok=True)  # while it is still ours


def _key(
    corpus: Corpus, columns: Columns, model: Model, fingerprint: str, options: Options, kind: Kind
) -> str:
    """Names what the output will be: the same rows, by the same model, in the same form."""
    said = {
        "files": [asdict(file) for file in corpus.files],
        "units": [unit.pieces for unit in corpus.units],
        "carried": base64.b64encode(corpus.carried.serialize().to_pybytes()).decode(),
        "columns": columns,
        "fingerprint": fingerprint,
        "computed_in": model.dtype,
        "options": asdict(options),
        "kind": kind,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _told(task: Task) -> dict[str, Any]:
    """For people, and to know the job again."""
    return {
        "job": task.key,
        "model": task.info.name,
        "version": task.info.version,
        "fingerprint": task.info.fingerprint,
        "rows": task.corpus.rows,
        "units": len(task.corpus.units),
        "files": [file.path for file in task.corpus.files],
    }


def _plan_of(folder: Folder) -> dict[str, Any]:
    """What `_told` wrote there; empty if that is not there."""
    try:
        told = json.loads(folder.read(JOB) or b"{}")
        return {name: told[name] for name in ("job", "model", "version")} if told else {}
    except (ValueError, LookupError, TypeError):
        return {}


def _is_ours(folder: Folder, key: str) -> bool:
    """Whether something of this job is there.

    Raises:
        OtherJob: it is another's.
    """
    met = _plan_of(folder).get("job")
    if met and met != key:
        raise OtherJob(
            f"{folder.uri} belongs to another job: other files, another model or version of it, or "
            "other options. "
            + (
                "Run that one to its end, or throw it away with --restart"
                if folder.uri.partition("?")[0].endswith(".staging")
                else "Name another folder with --out, or remove it"
            )
        )
    if not met and folder.names():
        raise OtherJob(f"{folder.uri} is not empty: name a folder with --out that is not there yet")
    return bool(met)
