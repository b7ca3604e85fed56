# SPDX-License-Identifier: Apache-2.0
"""How the running server follows the repository: new versions, candidates, new and removed models.

A version goes live in three moves, each after the last one has been proved:

    parts 1      ensemble 1
    parts 1, 2   ensemble 1      the new version loads beside the old, which keeps serving
    parts 1, 2   ensemble 2      it has answered: the ensemble turns to it at one moment
    parts 2      ensemble 2      nobody has asked the old one for a while: its memory is freed

A version that does not load, or does not answer, is refused: it is taken away again, and the old
one keeps serving. `next_state` is the whole decision, a function; `Rollout` asks and carries out.
"""

import logging
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arrowhead_server.errors import RepositoryError
from arrowhead_server.probe import FAILURES_IN_A_ROW, Pulse
from arrowhead_server.repository import EmbeddingModel, look_through, read_repository
from arrowhead_server.shown import Shown

LOGGER = logging.getLogger(__name__)

# Both parts of a version, (base, version): what is loaded, proved, refused and freed together.
Pair = tuple[str, int]

LOAD_TIMEOUT_S = 300.0  # large models on slow disks
QUIET_S = 3.0  # so long nobody has asked a version that is to be freed
_FAILED = re.compile(r"failed to load '(?P<part>[^']+)' version (?P<version>\d+): (?P<why>[^\n]+)")


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
            frozenset((model.base, model.version) for model in models),
            {model.name: model for model in models},
        )


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
        pair = (model.base, model.version)
        if pair in proved and pair not in refused:
            serving[model.name] = model
        elif model.name in shown.serving:
            serving[model.name] = shown.serving[model.name]
    to_load = {(model.base, model.version) for model in wanted} - set(refused)
    in_use = {(model.base, model.version) for model in serving.values()}
    # An ensemble that changes in this move asks the old version until Triton has taken it up.
    before = {(model.base, model.version) for model in shown.serving.values()}
    leaving = (shown.pairs - to_load - in_use) & (set(busy) | (before - in_use))
    return State(frozenset(to_load | in_use | (leaving - set(refused))), serving)


class Rollout:
    """Keeps what Triton is shown in step with the repository.

    `look` only asks, and may be slow; `apply` only changes files, at once. So the first may run
    beside the supervisor, which does the second itself, after it has taken leave of the processes
    that are about to end.

    Args:
        repository: what is served.
        folder: where to keep what Triton is shown.
    """

    def __init__(self, repository: Path, folder: Path) -> None:
        self.shown = Shown(repository, folder)
        self.state = State()
        self._repository = repository
        self._proved: set[Pair] = set()
        self._refused: dict[Pair, tuple[float, ...]] = {}  # with the times of its files
        self._since: dict[Pair, float] = {}  # when it was shown
        self._quiet: dict[Pair, tuple[int, float]] = {}  # answers given, and since when so many
        self._heard: dict[Pair, str] = {}  # why Triton could not load it
        self._failures: dict[Pair, int] = {}  # of its first inferences, in a row
        self._complaints: dict[str, str] = {}
        self.hanging: set[Pair] = set()  # did not load in time: their processes are to be killed

    @property
    def models(self) -> tuple[EmbeddingModel, ...]:
        """What is served now."""
        return tuple(self.state.serving[name] for name in sorted(self.state.serving))

    @property
    def live(self) -> set[tuple[str, int]]:
        """The parts whose end is a failure: (name, version) of all that have answered."""
        return {
            (f"{base}_{part}", version)
            for base, version in self._proved & self.state.pairs
            for part in ("tokenizer", "encoder")
        }

    def begin(self) -> None:
        """Shows all that is wanted at once, to a Triton that is about to start.

        Raises:
            RepositoryError: there is nothing to serve.
        """
        self.shown.clear()
        self._proved.clear()
        self._heard.clear()
        self._failures.clear()
        served = self.state.serving
        self.state = State()
        self.hanging.clear()
        # After a crash: what served. A version that is wanted since then has yet to be proved, and
        # is so beside it. Only what was removed meanwhile gives way to what is wanted now.
        models = [model for model in served.values() if self.shown.has(model)]
        if not models:
            models = list(read_repository(self._repository))
        self.apply(State.of(models))

    def begun(self) -> None:
        """The start went well: all that is shown has answered."""
        self._proved |= self.state.pairs

    def hear(self, line: str) -> None:
        """Takes a line of Triton's log; it says there why a version did not load."""
        if found := _FAILED.search(line):
            base, _, _ = found["part"].rpartition("_")
            why = found["why"].split("\\n", maxsplit=1)[0].rstrip('"; ').strip()
            self._heard[base, int(found["version"])] = why

    def look(self, pulse: Pulse) -> State:
        """What to show next; asks the repository and Triton, and decides who is refused."""
        try:
            models, faults = look_through(self._repository)
        except RepositoryError as error:  # unmounted, say
            self._complain({"the repository": str(error)})
            return self.state
        self._complain({f"'{name}'": str(error) for name, error in faults.items()})
        # What cannot be read, while somebody edits or for good, stays; the others are followed.
        wanted = [
            *models,
            *(self.state.serving[name] for name in faults if name in self.state.serving),
        ]
        self._forgive()
        for pair in sorted(self.state.pairs - self._proved - self._refused.keys()):
            self._judge(pair, pulse)
        busy = {pair for pair in self.state.pairs if not self._is_quiet(pair, wanted, pulse)}
        return next_state(self.state, wanted, proved=self._proved, refused=self._refused, busy=busy)

    def apply(self, state: State) -> None:
        """Changes what Triton is shown: parts come before what uses them, and go after it."""
        before = self.state
        for base, version in sorted(state.pairs - before.pairs):
            for part in (f"{base}_tokenizer", f"{base}_encoder"):
                self.shown.show_part(part, version)
            self._since[base, version] = time.monotonic()
        for name, model in state.serving.items():
            if before.serving.get(name) != model:
                self.shown.show_ensemble(model)
                if name in before.serving:
                    LOGGER.warning(
                        "%s: version %d is live, in place of %d",
                        name,
                        model.version,
                        before.serving[name].version,
                    )
        for name in before.serving.keys() - state.serving.keys():
            self.shown.hide_ensemble(name)
            LOGGER.warning("%s is not served any more", name)
        for base, version in sorted(before.pairs - state.pairs):
            for part in (f"{base}_encoder", f"{base}_tokenizer"):
                self.shown.hide_part(part, version)
            self._proved.discard((base, version))
        self.state = state

    def _complain(self, complaints: dict[str, str]) -> None:
        for what, why in complaints.items():
            if self._complaints.get(what) != why:  # once
                LOGGER.warning("%s is not followed: %s", what, why)
        self._complaints = complaints

    def _judge(self, pair: Pair, pulse: Pulse) -> None:
        """Proves a version that is shown, or refuses it."""
        base, version = pair
        model = EmbeddingModel(base, 0, version, base)
        why = self._heard.pop(pair, None)
        if why is None and pulse.has_loaded(model):
            failure = "; ".join(pulse.failures([model]).values())
            if not failure:
                self._proved.add(pair)
                self._failures.pop(pair, None)
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
            self._failures.pop(pair, None)
            self._refused[pair] = self._times(pair)
            LOGGER.warning(
                "%s version %d is refused, what was served stays: %s; run `arrowhead rollback %s`, "
                "or convert it again",
                base,
                version,
                why,
                base,
            )

    def _forgive(self) -> None:
        """A refused version is tried again once its files have changed."""
        for pair in list(self._refused):
            if self._times(pair) != self._refused[pair]:
                del self._refused[pair]

    def _times(self, pair: Pair) -> tuple[float, ...]:
        base, version = pair
        folders = [self._repository / f"{base}_{part}" for part in ("tokenizer", "encoder")]
        files = [file for folder in folders for file in (folder / str(version)).glob("*")]
        return tuple(sorted(file.stat().st_mtime for file in files if file.is_file()))

    def _is_quiet(self, pair: Pair, wanted: Collection[EmbeddingModel], pulse: Pulse) -> bool:
        """Whether a version that nobody is to ask any more has not been asked for `QUIET_S`."""
        base, version = pair
        users = [*wanted, *self.state.serving.values()]
        if any((model.base, model.version) == pair for model in users):
            self._quiet.pop(pair, None)
            return False
        answers = pulse.answers(EmbeddingModel(base, 0, version, base))
        now = time.monotonic()
        known, since = self._quiet.get(pair, (-1, now))
        if answers != known:
            self._quiet[pair] = answers, now
            return False
        return now - since >= QUIET_S
