# SPDX-License-Identifier: Apache-2.0
"""`Account`: what is told of a model's batches, as counters and as lines of a log.

Of a batch, never of a text: to hand one number to Triton costs 30-45 us, and a short text takes 2
ms. So numbers are kept here and handed on once a second, by a thread of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeAlias

BATCHES_VARIABLE = "ARROWHEAD_LOG_BATCHES"  # any value: a line for each batch
PERIOD_S = 1.0
BATCH_TOKENS = (16, 64, 256, 1024, 4096)  # the buckets' upper ends; all are in +Inf

# name -> help. Names as Prometheus wants them, without `arrowhead_` in front.
COUNTERS = {
    "texts_total": "Texts of requests that were not refused",
    "tokens_total": "Tokens of these texts, special ones included",
    "texts_truncated_total": "Texts that the model does not read to their end",
    "requests_refused_total": "Requests answered with INVALID_ARG",
    "batches_total": "Executions with one text at least",
    "texts_reused_total": "Texts not computed: equal to others of the batch, or of the last",
    "tokens_computed_total": "Tokens that went through the network",
    "padding_saved_tokens_total": "Places that a batch padded to its longest text would have more",
    "batches_by_tokens_total": "Batches of at most `le` computed tokens",
}

Labels: TypeAlias = tuple[tuple[str, str], ...]
Series: TypeAlias = "tuple[str, Labels]"


_MOST_IDS = 200  # told of a batch; of more, their number
_LINE_IDS = 2000  # characters of ids in a line, which must fit a pipe's 4 KB to stay in one piece
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Batch(NamedTuple):
    """What one execution was made of.

    Attributes:
        texts, tokens: of the requests that were not refused.
        truncated: texts that the model does not read to their end.
        refused: why requests were.
        seconds: that it took.
        computed: of an encoder, the tokens of each text that was computed.
        equal, remembered: texts that were not: equal to another, or of the batch before.
    """

    texts: int
    tokens: int
    truncated: int
    refused: Sequence[Exception]
    seconds: float
    computed: Sequence[int] | None = None
    equal: int = 0
    remembered: int = 0


class Metric(Protocol):
    """A counter."""

    def increment(self, value: float) -> object:
        """Adds to it."""


class Family(Protocol):
    """Counters of one name."""

    def Metric(self, *, labels: Mapping[str, str]) -> Metric:  # noqa: N802 (as Triton calls it)
        """The one of these labels."""


class NewFamily(Protocol):
    """Makes one, which is there for as long as somebody keeps it."""

    def __call__(self, *, name: str, description: str) -> Family:
        """Of this name."""


class Account:
    """Adds up what batches were made of.

    Args:
        model: the name of the model.
        version: of the model.
        family: makes counters of a name.
        instance: which of the model's processes this is; its counters are its own. Triton counts
            the users of a counter for each process apart, so the end of one may take a shared
            counter away from the others. Empty, as of a `model.py` converted before: shared.
    """

    def __init__(self, model: str, version: str, family: NewFamily, instance: str = "") -> None:
        self._model = model
        own = {"model_instance": instance} if instance else {}
        self._of_model = {"model": model, "version": version, **own}
        self._family = family
        self._families: dict[str, Family] = {}
        self._metrics: dict[Series, Metric] = {}
        self._batches: list[Batch] = []
        self._told: Batch | None = None  # whose refusals had a line of their own, of late
        self._over = threading.Event()
        self._has_failed = False
        self._logs_batches = bool(os.environ.get(BATCHES_VARIABLE))
        self._thread = threading.Thread(target=self._hand_on, name="account", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hands on what is left. Nothing may be added from now on."""
        self._over.set()
        self._thread.join()

    def add(self, batch: Batch, ids: Callable[[], Iterable[str]]) -> None:
        """Takes note of a batch; `ids` tells those of its requests, if they are wanted.

        Of batches with refused requests the first has a line. What follows within a second, or
        while that goes on, is told of in one a second: a stranger must not fill the log.
        """
        self._batches.append(batch)
        if batch.refused and self._told is None:
            self._told = batch
            number, first = len(batch.refused), batch.refused[0]
            self._line(
                "warning", f"refused {number} of a batch's requests; the first: {first}", ids
            )
        if self._logs_batches:
            own = {"texts": batch.texts, "tokens": batch.tokens, "truncated": batch.truncated}
            if batch.computed is not None:
                own["tokens_computed"] = sum(batch.computed)
            self._line("info", "batch", ids, **own, ms=round(batch.seconds * 1000, 3))

    def tell(self, level: str, message: str) -> None:
        """Writes a line to the log that is of no batch."""
        self._line(level, message, lambda: ())

    def _line(
        self, level: str, message: str, ids: Callable[[], Iterable[str]], **rest: object
    ) -> None:
        """One object a line; `arrowhead serve` reads it back. What ids need goes on in more."""
        line = {"part": self._model, "level": level, "message": message, **rest}
        # A gateway sends the ids of all whose texts are in a request as one, with commas between.
        own = [one for joined in ids() for one in joined.split(",") if _SANE_ID.fullmatch(one)]
        if len(own) > _MOST_IDS:
            line["more_ids"] = len(own) - _MOST_IDS
        pieces = [""]
        for one in own[:_MOST_IDS]:
            if len(pieces[-1]) + len(one) >= _LINE_IDS:
                pieces.append("")
            pieces[-1] += f",{one}" if pieces[-1] else one
        for number, piece in enumerate(pieces):
            if number:
                line = {"part": self._model, "level": level, "message": "more ids of the last line"}
            if piece:
                line["request_id"] = piece
            with suppress(OSError):  # a log on a full disk costs no answer
                sys.stderr.write(f"{json.dumps(line)}\n")
                sys.stderr.flush()

    def _hand_on(self) -> None:
        """Once a second, and at the end, so that the last batch is told of too."""
        is_over = False
        while not is_over:
            is_over = self._over.wait(PERIOD_S)
            batches, self._batches = self._batches, []
            self._tell_of_more(batches)
            try:
                for series, number in _sums(batches).items():
                    if series not in self._metrics:
                        self._metrics[series] = self._metric(*series)
                    if number:
                        self._metrics[series].increment(number)
            except Exception as error:  # noqa: BLE001 (a Triton without metrics serves all the same)
                # Those of this second are lost. The next may go: a full /dev/shm refuses them, too.
                if not self._has_failed:
                    self.tell("warning", f"no metrics of batches: {error}")
                self._has_failed = True

    def _tell_of_more(self, batches: Sequence[Batch]) -> None:
        more = [one.refused for one in batches if one.refused and one is not self._told]
        if not more:
            self._told = None
            return
        number, last = sum(map(len, more)), more[-1][-1]
        self.tell("warning", f"refused {number} more requests; the last: {last}")

    def _metric(self, name: str, labels: Labels) -> Metric:
        if name not in self._families:
            made = self._family(name=f"arrowhead_{name}", description=COUNTERS[name])
            self._families[name] = made
        return self._families[name].Metric(labels=self._of_model | dict(labels))


def _sums(batches: Sequence[Batch]) -> dict[Series, int]:
    sums: dict[Series, int] = {
        ("texts_total", ()): sum(one.texts for one in batches),
        ("tokens_total", ()): sum(one.tokens for one in batches),
        ("texts_truncated_total", ()): sum(one.truncated for one in batches),
        ("requests_refused_total", ()): sum(len(one.refused) for one in batches),
        ("batches_total", ()): sum(one.texts > 0 for one in batches),
    }
    computed = [one.computed for one in batches if one.computed is not None]
    if computed:  # an encoder
        tokens = [sum(lengths) for lengths in computed]
        places = sum(len(lengths) * max(lengths, default=0) for lengths in computed)
        sums["tokens_computed_total", ()] = sum(tokens)
        sums["padding_saved_tokens_total", ()] = places - sum(tokens)
        sums["texts_reused_total", (("how", "batch"),)] = sum(one.equal for one in batches)
        sums["texts_reused_total", (("how", "step"),)] = sum(one.remembered for one in batches)
        for end in (*BATCH_TOKENS, math.inf):
            label = "+Inf" if end == math.inf else str(end)
            number = sum(0 < some <= end for some in tokens)
            sums["batches_by_tokens_total", (("le", label),)] = number
    return sums
