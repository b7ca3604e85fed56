# SPDX-License-Identifier: Apache-2.0
"""One target in a process of its own: `perf.fuzz.worker TARGET FOLDER SECONDS SEED REPOSITORY`.

Whatever a check raises is noted and fuzzing goes on. What ends or stops the process is noticed by
`run`, which reads in FOLDER how far it came (`progress`) and with which input (`input`).

By atheris, coverage of Arrowhead's own modules decides which inputs are kept and changed further;
its bytes are what Hypothesis draws from. Without it Hypothesis draws by itself.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import random
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

_OURS = ("arrowhead_client", "arrowhead_engine", "arrowhead_server")
_MOST_INPUT = 16_384  # bytes of an input's description
_MOST_FAULTS = 50
_ROUND = 500  # inputs that Hypothesis draws from one seed
_SEEDS = 200  # files that atheris begins with, of random bytes
_SETTINGS = settings(
    max_examples=_ROUND,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Notes:
    """What `run` reads: numbers of inputs, the one of the moment, and faults."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._progress = _mapped(folder / "progress", 8)
        self._input = _mapped(folder / "input", _MOST_INPUT)
        self._known: dict[str, int] = {}
        self.tried = 0

    def begin(self, value: Any) -> None:
        """The next input."""
        self.tried += 1
        raw = repr(value).encode("utf-8", "replace")[: _MOST_INPUT - 1] + b"\0"
        self._input[: len(raw)] = raw
        struct.pack_into("<q", self._progress, 0, self.tried)

    def fault(self, value: Any, error: BaseException) -> None:
        """An input that raised; the first of each place is described, the others are counted."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "arrowhead_" in f.filename or "perf/fuzz" in f.filename]
        at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        what = f"{type(error).__name__} at {at}"
        if what not in self._known and len(self._known) < _MOST_FAULTS:
            told = {"what": what, "message": str(error)[:500], "input": repr(value)[:_MOST_INPUT]}
            with (self._folder / "faults.jsonl").open(
                "a", encoding="utf-8", errors="replace"
            ) as file:
                file.write(json.dumps(told) + "\n")
        self._known[what] = self._known.get(what, 0) + 1


def _mapped(path: Path, size: int) -> mmap.mmap:
    path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size)


def has_atheris() -> bool:
    """Whether coverage can be followed here (atheris has no build for every Python)."""
    return importlib.util.find_spec("atheris") is not None


def main(name: str, folder: Path, seconds: float, number: int, repository: Path) -> None:
    """Fuzzes one target for so long."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=ResourceWarning)
    guided = name in json.loads((folder / "guided").read_text()) and has_atheris()
    if guided:
        import atheris

        with atheris.instrument_imports(include=list(_OURS), enable_loader_override=False):
            from perf.fuzz.targets import TARGETS
    else:
        from perf.fuzz.targets import TARGETS
    target, notes = TARGETS[name], Notes(folder)
    with target.opened(repository) as check:

        def noted(value: Any) -> None:
            notes.begin(value)
            try:
                check(value)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is a fault)
                notes.fault(value, error)

        for value in target.found:
            noted(value)
        if guided:
            _by_coverage(given(target.inputs)(noted), folder, seconds, number)
        else:
            _at_random(lambda: given(target.inputs)(noted), seconds, number)


def _at_random(test: Callable[[], Callable[[], None]], seconds: float, number: int) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        seed(number)(_SETTINGS(test()))()
        number += 1


def _by_coverage(test: Any, folder: Path, seconds: float, number: int) -> None:
    """Never comes back: libFuzzer ends the process. What it says of coverage is on stderr."""
    import atheris

    corpus, draw = folder / "corpus", random.Random(number)  # noqa: S311 (no secret)
    corpus.mkdir(exist_ok=True)
    for file in range(_SEEDS):
        (corpus / f"seed {file}").write_bytes(
            draw.randbytes(draw.choice([16, 64, 256, 1024, 4096]))
        )
    one = _SETTINGS(test).hypothesis.fuzz_one_input
    atheris.Setup(
        [
            "fuzz",
            str(corpus),
            f"-max_total_time={max(1, round(seconds))}",
            f"-seed={number + 1}",
            f"-artifact_prefix={folder}/",
            "-max_len=8192",
            "-len_control=0",
            "-rss_limit_mb=0",  # these two are looked at by `run`
            "-timeout=100000",
            "-print_final_stats=1",
        ],
        one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        float(sys.argv[3]),
        int(sys.argv[4]),
        Path(sys.argv[5]),
    )
