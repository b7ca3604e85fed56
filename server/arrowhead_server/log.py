# SPDX-License-Identifier: Apache-2.0
"""Triton's log: which line says why a start failed, which one to show, and what it says."""

import json
import logging
import re
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

# The last lines of a run, for when Triton ends without saying why.
_KEPT_LINES = 200

# A line of Triton's own: severity, month and day, time, thread, file:line] message.
_TRITON_LINE = re.compile(
    r"^(?P<severity>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (?P<file>[\w./]+:\d+)\] +(?P<message>.*)"
)
_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
# A line of a model's (`arrowhead_engine.account`).
_MODEL_LINE = '{"part": "'

# Why a start failed, best explanation first: Triton reports the same failure several times, each
# time further from its cause.
_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?:\w[\w ]*?: )?(?P<why>.+)"),
        "model '{model}' failed to load: {why}",
    ),
    (
        re.compile(r"Error parsing text-format inference\.ModelConfig: (?P<why>.+)"),
        "a config.pbtxt cannot be read, line:column {why}",
    ),
    (
        re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<why>.+)"),
        "model '{model}' cannot be read: {why}",
    ),
    (
        re.compile(r"Invalid argument: (?P<why>ensemble .+)"),
        "{why}",
    ),
    (
        re.compile(r"failed to start (?P<what>\w+) service: (?:\w+ - )?(?P<why>.+)"),
        "the {what} endpoint cannot start: {why}",
    ),
    (
        re.compile(r"error: creating server: (?:\w+ - )?(?P<why>.+)"),
        "{why}",
    ),
)
# Said as an error whenever an ensemble is loaded on a machine without a GPU; it needs no stream.
_NO_STREAM = re.compile(r"unable to create stream for \S+: CUDA")
# After this one the start is lost, yet Triton takes 2-3 s more to unload what did load.
_FATAL = _CAUSES[0][0]


class Told(NamedTuple):
    """A line, taken apart.

    Attributes:
        part: who says it: triton, or a model's name.
        level: as `logging` has them.
        fields: what it tells beside the message.
    """

    part: str
    level: int
    message: str
    fields: Mapping[str, Any]


def read(line: str) -> Told:
    """What a line of Triton's, or of a model's, says."""
    if line.startswith(_MODEL_LINE):
        try:
            fields = json.loads(line)
            level = logging.WARNING if fields.pop("level") == "warning" else logging.INFO
            return Told(str(fields.pop("part")), level, str(fields.pop("message")), fields)
        except (ValueError, KeyError, AttributeError):
            pass  # torn, or none of ours
    if (own := _TRITON_LINE.match(line)) is not None:
        return Told("triton", _LEVELS[own["severity"]], own["message"], {"file": own["file"]})
    return Told("triton", logging.WARNING, line, {})  # what a model prints, or a library of its


class Log:
    """Keeps the last lines of one run and finds the cause of a failed start in them."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.is_fatal = False

    def add(self, line: str) -> None:
        """Takes the next line."""
        self._lines.append(line)
        self.is_fatal = self.is_fatal or _FATAL.search(line) is not None

    def cause(self) -> str | None:
        """One line on why the start failed, or None if no line of the log explains it."""
        for pattern, message in _CAUSES:
            for line in self._lines:
                if found := pattern.search(line):
                    parts = {key: _first_line(text) for key, text in found.groupdict().items()}
                    return message.format(**parts)
        return None


def is_for_operators(line: str) -> bool:
    """Whether a running server's line is worth showing: Triton's errors, and what models print."""
    own = _TRITON_LINE.match(line)
    worth = own is None or own["severity"] in "EF"
    return bool(line.strip()) and worth and _NO_STREAM.search(line) is None


def _first_line(text: str) -> str:
    # Triton quotes its messages and writes a traceback's line feeds as backslash and n.
    return text.split("\\n", maxsplit=1)[0].rstrip('"; ').strip()
