# SPDX-License-Identifier: Apache-2.0
"""How the running server follows the repository: new versions, candidates, new and removed models.

A version goes live in three moves, each after the last one has been proved:

    parts 1      ensemble 1
    parts 1, 2   ensemble 1      the new version loads beside the old, which keeps serving
    parts 1, 2   ensemble 2      it has answered: the ensemble turns to it at one moment
    parts 2      ensemble 2      nobody has asked the old one for a while: its memory is freed

A version that does not load, or does not answer, is refused: it is taken away again, and the old
one keeps serving. So is one whose ensemble Triton does not take up. `next_state` is the whole
decision, a function; `Rollout` asks and carries out.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from arrowhead_conversion import files
from arrowhead_server.errors import NotSignedError, RepositoryError
from arrowhead_server.probe import FAILURES_IN_A_ROW, Part, Pulse
from arrowhead_server.repository import (
    CANDIDATE,
    EmbeddingModel,
    Pair,
    look_through,
    read_repository,
)
from arrowhead_server.shown import Shown

if TYPE_CHECKING:  # it takes what only signed models need
    from arrowhead_server.admission import Admission

LOGGER = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 300.0  # large models on slow disks
QUIET_S = 3.0  # so long nobody has asked a version that is to be freed
_FAILED = re.compile(r"failed to load '(?P<model>[^']+)' version (?P<version>\d+): (?P<why>[^\n]+)")
_UNREADABLE = re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<why>[^\n]+)")


@dataclass(frozen=True)
class State:
    """What Triton is shown.

    Attributes:
        pairs: the versions of parts.
        serving: the ensembles by name.
    """

    pairs: frozenset[Pair] = frozenset()
    serving: Mapping[str, EmbeddingModel] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Collection[EmbeddingModel]) -> "State":
        """What serves exactly these models."""
        return cls(
            frozenset(model.pair for model in models),
            {model.name: model for model in models},
        )


def _model(pair: Pair) -> EmbeddingModel:
    """The two parts, without an ensemble, to ask Triton of them."""
    base, version = pair
    return EmbeddingModel(base, 0, version, base)


def parts(pairs: Iterable[Pair]) -> set[Part]:
    """The tokenizers and encoders of these versions."""
    return {(part, pair[1]) for pair in pairs for part in _model(pair).parts}


def next_state(
    shown: State,
    wanted: Collection[EmbeddingModel],
    *,
    proved: Collection[Pair],
    refused: Collection[Pair],
    busy: Collection[Pair],
) -> State:
    """What to show next.

    Args:
        shown: what is shown now.
        wanted: what the repository says is to be served.
        proved: versions of parts that are loaded and have answered.
        refused: versions that must not be shown.
        busy: versions of which it is not sure that nobody uses them any more.
    """
    serving = {}
    for model in wanted:
        pair = model.pair
        if pair in proved and pair not in refused:
            serving[model.name] = model
        elif model.name in shown.serving:
            serving[model.name] = shown.serving[model.name]
    to_load = {model.pair for model in wanted} - set(refused)
    in_use = {model.pair for model in serving.values()}
    # An ensemble that changes in this move asks the old version until Triton has taken it up.
    before = {model.pair for model in shown.serving.values()}
    leaving = (shown.pairs - to_load - in_use) & (set(busy) | (before - in_use))
    return State(frozenset(to_load | in_use | (leaving - set(refused))), serving)


class _LeftOff(Exception):
    """A look was asked to end before it was through."""


@dataclass(frozen=True)
class _Turn:
    """An ensemble that was shown at another version, until Triton has taken that up."""

    before: EmbeddingModel | None
    since: float
    times: tuple[float, ...]  # of its files, before they were read


class Rollout:
    """Keeps what Triton is shown in step with the repository.

    `look` only asks, and may be slow; `apply` only changes files, at once. So the first may run
    beside the supervisor, which does the second itself, after it has taken leave of the processes
    that are about to end. A look must be over before anything else is called but `leave_off`.

    Args:
        repository: what is served.
        folder: where to keep what Triton is shown.
        admission: what versions have to pass before they are shown; None lets all pass.

    Attributes:
        state: what is shown.
        hanging: versions that did not load in time, whose processes are to be killed.
        restart: why Triton must be started anew to go on; else empty.
    """

    def __init__(
        self, repository: Path, folder: Path, admission: "Admission | None" = None
    ) -> None:
        self.shown = Shown(repository, folder, admission)
        self._admission = admission
        self.state = State()
        self.hanging: set[Pair] = set()
        self.restart = ""
        self._repository = repository
        self._refused: dict[Pair, tuple[float, ...]] = {}  # with the times of its files
        # Likewise, of those whose parts are well.
        self._refused_ensembles: dict[EmbeddingModel, tuple[float, ...]] = {}
        self._wanted: list[EmbeddingModel] = []  # by the repository, at the last look
        self._last: dict[str, EmbeddingModel] = {}  # what served, and was proved
        self._complaints: dict[str, str] = {}
        self._deaths: dict[Pair, int] = {}  # of Triton, while it loaded this
        self._starts = 0  # since the last good one
        self._is_left_off = False
        self._forget()

    def _forget(self) -> None:
        """A new Triton: what was learnt of the last one is void, and what still asks it too."""
        self._proved: set[Pair] = set()
        self._since: dict[Pair, float] = {}  # when it was shown
        self._quiet: dict[Pair, tuple[int | None, float]] = {}  # answers given, and since when
        self._heard: dict[str, dict[int, str]] = {}  # by model and version: why it did not load
        self._tried: dict[Pair, tuple[float, ...]] = {}  # times of its files, before it was read
        self._failures: dict[Pair, int] = {}  # of its first inferences, in a row
        self._turns: dict[str, _Turn] = {}
        self._prints: dict[Pair, str] = {}  # of what served, by its name and version

    @property
    def models(self) -> tuple[EmbeddingModel, ...]:
        """What is served now."""
        serving = self.state.serving  # once: another thread may put a new state in its place
        return tuple(serving[name] for name in sorted(serving))

    def live(self, state: State) -> set[Part]:
        """The parts whose end is a failure: all that have answered, and stay in `state`."""
        return parts(self._proved & self.state.pairs & state.pairs)

    def begin(self, progress: Callable[[int], object]) -> None:
        """Shows all that is to be served at once, to a Triton that is about to start.

        Args:
            progress: called now and then while signed versions are copied, which may take long.

        Raises:
            RepositoryError: there is nothing to serve, or it is not signed.
        """
        used = {model.pair for model in self.state.serving.values()}
        for pair in sorted(self.state.pairs - self._proved - used - self._refused.keys()):
            self._deaths[pair] = self._deaths.get(pair, 0) + 1
            if self._deaths[pair] >= FAILURES_IN_A_ROW:  # fewer may be chance
                self._refuse(pair, "Triton died each time while it loaded")
        self.hanging.clear()
        self.restart = ""
        self._is_left_off = False
        self._forget()
        self.shown.clear()
        self.state = State()
        self._starts += 1
        # After a crash: what served. A version that is wanted since then has yet to be proved, and
        # is so beside it. But if that start fails too, what is wanted now, and so on in turns.
        served = [model for model in self._last.values() if self.shown.has(model)]
        try:
            if not served or self._starts % 2 == 0:
                served = list(read_repository(self._repository))
            self._admit_all({model.pair for model in served}, progress)
            self.apply(State.of(served))
        except (OSError, ValueError) as error:
            raise RepositoryError(f"the repository cannot be read: {error}") from error

    def begun(self) -> None:
        """The start went well: all that is shown has answered."""
        self._starts = 0
        self._proved |= self.state.pairs
        self._turns.clear()
        for model in self.models:
            self._is_live(model)

    def unloadable(self) -> list[EmbeddingModel]:
        """What is shown and, as Triton said, did not load."""
        return [
            model
            for model in self.models
            if any(model.version in self._heard.get(part, {}) for part in model.parts)
        ]

    def hear(self, line: str) -> None:
        """Takes a line of Triton's log; it says there why a model did not load."""
        if found := _FAILED.search(line) or _UNREADABLE.search(line):
            why = found["why"].split("\\n", maxsplit=1)[0].rstrip('"; ').strip()
            version = int(found.groupdict().get("version") or 0)
            self._heard.setdefault(found["model"], {})[version] = why

    def leave_off(self) -> None:
        """Has a look that is under way end soon: a copy of gigabytes is given up. Any thread."""
        self._is_left_off = True

    def look(self, pulse: Pulse) -> State:
        """What to show next; asks the repository and Triton, and decides who is refused."""
        try:
            models, faults = look_through(self._repository)
        except (RepositoryError, OSError) as error:  # unmounted, say
            self._complain({"the repository": str(error)})
            return self.state
        complaints = {f"'{name}'": str(error) for name, error in faults.items()}
        for model in models:
            if self.state.serving.get(model.name) == model and self._is_another(model):
                complaints[f"'{model.name}'"] = (
                    f"the files of version {model.version} were replaced while it is served: "
                    "convert it as a new version, or restart the server"
                )
        self._complain(complaints)
        # What cannot be read, while somebody edits or for good, stays; the others are followed.
        wanted = [
            *models,
            *(self.state.serving[name] for name in faults if name in self.state.serving),
        ]
        self._wanted = wanted
        self._forgive()
        self._admit_new({model.pair for model in wanted})
        proved = self._proved
        for pair in sorted(self.state.pairs - proved - self._refused.keys()):
            self._judge(pair, pulse, proved)
        shown = self._turned(pulse)
        wanted = self._followed(shown)
        busy = {pair for pair in self.state.pairs if not self._is_quiet(pair, wanted, pulse)}
        busy |= {t.before.pair for t in self._turns.values() if t.before}
        state = next_state(shown, wanted, proved=proved, refused=self._refused, busy=busy)
        for name, model in state.serving.items():
            if self.state.serving.get(name) != model and self._is_another(model):
                self.restart = f"{name} version {model.version} is not what bore that number before"
                return self.state
        return state

    def apply(self, state: State) -> None:
        """Changes what Triton is shown: parts come before what uses them, and go after it.

        What cannot be shown, because its files went meanwhile, is refused or left as it was.

        Raises:
            OSError, ValueError, NotSignedError: at a start, where there is nothing to leave.
        """
        before, at_start = self.state, not self.state.pairs
        pairs, serving = set(state.pairs), dict(state.serving)
        for pair in sorted(state.pairs - before.pairs):
            try:
                self._show(pair)
            except (OSError, ValueError) as error:
                if at_start:
                    raise
                self._refuse(pair, str(error))
                pairs.discard(pair)
        for name, model in state.serving.items():
            old = before.serving.get(name)
            if old == model:
                continue
            self._heard.pop(name, None)
            times = self._times(model.pair, [name])
            try:
                self.shown.show_ensemble(model)
            except (OSError, ValueError, NotSignedError) as error:
                if at_start:
                    raise
                self._refuse_ensemble(model, str(error), times)
                if old is not None:
                    serving[name] = old
                else:
                    del serving[name]
                continue
            self._turns[name] = _Turn(old, time.monotonic(), times)
            self._prints.setdefault((name, model.version), self._print(model))
        for name in before.serving.keys() - state.serving.keys():
            self.shown.hide_ensemble(name)
            self._turns.pop(name, None)
            if self._last.pop(name, None) is not None:
                LOGGER.warning("%s is not served any more", name)
        used = {model.pair for model in serving.values()}
        for pair in sorted(before.pairs - state.pairs - used):
            self._hide(pair)
        self.state = State(frozenset(pairs | (used & before.pairs)), serving)

    def _admit_all(self, pairs: Collection[Pair], progress: Callable[[int], object]) -> None:
        """At a start. What served before serves again, whatever its files have become since.

        Raises:
            NotSignedError: of the first that has no signature, or not that of its files.
        """
        if self._admission is None:
            return
        for pair in sorted(pairs):
            try:
                self._admission.admit(pair, progress)
            except NotSignedError as error:
                if pair not in self._admission:
                    raise
                LOGGER.warning("%s version %d is served as it was before: %s", *pair, error)

    def _admit_new(self, wanted: Collection[Pair]) -> None:
        if self._admission is None:
            return
        self._admission.keep({*wanted, *self.state.pairs})
        for pair in sorted({*wanted} - self.state.pairs - self._refused.keys()):
            self._tried.setdefault(pair, self._times(pair))
            try:
                self._admission.admit(pair, self._go_on)
            except NotSignedError as error:
                self._refuse(pair, str(error))

    def _go_on(self, _: int) -> None:
        if self._is_left_off:
            raise _LeftOff

    def _show(self, pair: Pair) -> None:
        self._tried.setdefault(pair, self._times(pair))
        shown: list[Part] = []
        try:
            for part, version in sorted(parts([pair])):
                self._heard.get(part, {}).pop(version, None)
                self.shown.show_part(part, version)
                shown.append((part, version))
        except (OSError, ValueError):
            for part, version in shown:
                self.shown.hide_part(part, version)
            raise
        self._since[pair] = time.monotonic()

    def _hide(self, pair: Pair) -> None:
        for part, version in sorted(parts([pair])):
            self.shown.hide_part(part, version)
        self._proved.discard(pair)
        self._failures.pop(pair, None)
        self._tried.pop(pair, None)

    def _complain(self, complaints: dict[str, str]) -> None:
        for what, why in complaints.items():
            if self._complaints.get(what) != why:  # once
                LOGGER.warning("%s is not followed: %s", what, why)
        self._complaints = complaints

    def _judge(self, pair: Pair, pulse: Pulse, proved: set[Pair]) -> None:
        """Proves a version that is shown, or refuses it."""
        model = _model(pair)
        reasons = (self._heard.get(part, {}).pop(model.version, None) for part in model.parts)
        why = next(filter(None, reasons), None)
        if why is None and pulse.has_loaded(model):
            failure = "; ".join(pulse.failures([model]).values())
            if not failure:
                proved.add(pair)
                self._deaths.pop(pair, None)
                return
            # A Triton that dies meanwhile says nothing of the version, a busy one not much.
            if pulse.is_ready():
                self._failures[pair] = self._failures.get(pair, 0) + 1
            if self._failures.get(pair, 0) >= FAILURES_IN_A_ROW:
                why = failure
        if why is None and time.monotonic() - self._since[pair] > LOAD_TIMEOUT_S:
            why = f"it has not loaded within {LOAD_TIMEOUT_S:.0f} s"
            # Triton looks at nothing else while a version loads, not even at whether that one is
            # still shown.
            self.hanging.add(pair)
        if why is not None:
            self._refuse(pair, why)

    def _refuse(self, pair: Pair, why: str) -> None:
        self._deaths.pop(pair, None)
        # What was put right since it was read is to be tried.
        self._refused[pair] = self._tried.pop(pair, ()) or self._times(pair)
        LOGGER.warning("%s version %d is refused, %s", *pair, self._told(pair, why))

    def _refuse_ensemble(self, model: EmbeddingModel, why: str, times: tuple[float, ...]) -> None:
        """What is at fault is its configuration: others may use the same parts."""
        self._refused_ensembles[model] = times
        if model.name == model.base:
            LOGGER.warning("%s version %d is refused, %s", *model.pair, self._told(model.pair, why))
            return
        path = self._repository / model.name / "config.pbtxt"
        LOGGER.warning(
            "%s is not served over %s version %d, what was served stays: %s; %s",
            model.name,
            *model.pair,
            why,
            _end_of_candidacy(model.base)
            if model.name == f"{model.base}{CANDIDATE}"
            else f"put {path} right, or remove its folder",
        )

    def _told(self, pair: Pair, why: str) -> str:
        """Why a version is refused, and what to do: it is not always the model that asks for it."""
        base = pair[0]
        users = sorted(model.name for model in self._wanted if model.pair == pair)
        if not users or base in users:
            advice = f"run `arrowhead rollback {base}`, or convert it again"
        elif f"{base}{CANDIDATE}" in users:
            advice = f"{_end_of_candidacy(base)}, or convert it again"
        else:
            advice = f"pin the steps of {', '.join(users)} to another version, or convert it again"
        return f"what was served stays: {why}; {advice}"

    def _turned(self, pulse: Pulse) -> State:
        """What is shown, but for ensembles that Triton does not take up: they turn back."""
        serving = dict(self.state.serving)
        for name, turn in list(self._turns.items()):
            model = serving[name]
            if pulse.serves(model):
                del self._turns[name]
                last = self._last.get(name, model)
                if last != model:  # the one that a refused one gave way to again was never away
                    old, new = last.version, model.version
                    LOGGER.warning("%s: version %d is live, in place of %d", name, new, old)
                self._is_live(model)
                continue
            said = self._heard.get(name, {})
            why = said.pop(model.version, None) or said.pop(0, None)
            if why is None and time.monotonic() - turn.since > LOAD_TIMEOUT_S:
                why = f"its ensemble was not taken up within {LOAD_TIMEOUT_S:.0f} s"
            if why is not None:
                self._refuse_ensemble(model, why, turn.times)
                if turn.before is None:
                    del serving[name]
                else:
                    serving[name] = turn.before
        return State(self.state.pairs, serving)

    def _is_live(self, model: EmbeddingModel) -> None:
        self.shown.taken_up(model)
        self._last[model.name] = model

    def _is_another(self, model: EmbeddingModel) -> bool:
        """Whether other files than now were served before under this name and number.

        Triton's response cache still holds their vectors; only its end empties it.
        """
        known = self._prints.get((model.name, model.version))
        return known is not None and known != self._print(model)

    def _print(self, model: EmbeddingModel) -> str:
        """A fingerprint of what is behind a model: its certificate, else its files."""
        folders = [self._repository / part / str(model.version) for part in model.parts]
        try:
            met = hashlib.sha256(files.read(folders[1] / "metadata.json")).hexdigest()
        except OSError:
            met = repr(_times(file for folder in folders for file in folder.glob("*")))
        return f"{model.base} {met}"

    def _followed(self, shown: State) -> list[EmbeddingModel]:
        """What is wanted; in place of an ensemble that was refused, what is shown of its name."""
        followed = (
            shown.serving.get(model.name) if model in self._refused_ensembles else model
            for model in self._wanted
        )
        return [model for model in followed if model is not None]

    def _forgive(self) -> None:
        """What was refused is tried again once its files have changed, or it is wanted anew."""
        wanted = {model.pair for model in self._wanted}
        for pair, times in list(self._refused.items()):
            if pair not in wanted or self._times(pair) != times:
                del self._refused[pair]
        for model, times in list(self._refused_ensembles.items()):
            if model not in self._wanted or self._times(model.pair, [model.name]) != times:
                del self._refused_ensembles[model]

    def _times(self, pair: Pair, ensembles: Collection[str] = ()) -> tuple[float, ...]:
        """Of a version's files, and of these ensembles'; by default of both that are ours."""
        base, _ = pair
        ensembles = ensembles or [base, f"{base}{CANDIDATE}"]
        found = [self._repository / name / "config.pbtxt" for name in ensembles]
        for part, version in parts([pair]):
            folder = self._repository / part
            found += [folder / "config.pbtxt", *(folder / str(version)).glob("*")]
            with suppress(OSError):
                found += files.beside(folder)
        return _times(found)

    def _is_quiet(self, pair: Pair, wanted: Collection[EmbeddingModel], pulse: Pulse) -> bool:
        """Whether a version that nobody is to ask any more has not been asked for `QUIET_S`."""
        users = [*wanted, *self.state.serving.values()]
        if any(model.pair == pair for model in users):
            self._quiet.pop(pair, None)
            return False
        answers = pulse.answers(_model(pair))
        now = time.monotonic()
        known, since = self._quiet.get(pair, (None, now))
        if answers is None or answers != known:
            self._quiet[pair] = answers, now
            return False
        return now - since >= QUIET_S


def _times(paths: Iterable[Path]) -> tuple[float, ...]:
    """When files were changed last; those that are not there have no time."""
    times = []
    for file in paths:
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return tuple(sorted(times))


def _end_of_candidacy(base: str) -> str:
    return f"run `arrowhead rollback {base} --candidate`"
