# SPDX-License-Identifier: Apache-2.0
"""`Stillness`: a process that stood still does not answer the batch it had then.

Triton waits for a model's process as long as it shows life, which a thread of that process does
every 300 ms. One that showed none for a second is dead to Triton, which fails its batch and sends
the next. If it had only stood still (paused, or without a CPU), it goes on and answers the failed
batch, and Triton takes that for an answer to the next, and so on: from then on every caller gets
another's vectors, or Triton crashes over them. Nothing in an answer says what it answers, so such a
process has to end unheard. (`StubLauncher::ReceiveMessageFromStub` and
`ModelInstanceState::ProcessRequests` in triton-inference-server/python_backend, the same from 24.10
to July 2026.)
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

# With the 300 ms before it, and some until that thread runs again, the second that Triton waits.
STILL_S = 0.55
BEAT_S = 0.1
# A batch that was sent to a process that stood still is begun so soon after it woke.
WAKING_S = 0.5
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: it may be tried again


class Beat(NamedTuple):
    """A moment, by all clocks: seconds."""

    now: float
    wall: float  # Triton's wait follows it, and a paused machine's other clock may stand still too
    own: float  # CPU time of the thread that answers


class Stillness:
    """Watches whether the process stood still; made and asked by the thread that answers.

    Args:
        tell: writes a line to the log, of a level and a message.
    """

    def __init__(self, tell: Callable[[str, str], object]) -> None:
        self._tell = tell
        # That thread may hold Python's lock for long, at work: then nobody beats, nothing is wrong.
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._last = self._beat()
        self._woke, self._stood = -math.inf, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="stillness", daemon=True)
        self._thread.start()

    def check(self, began: float) -> None:
        """Ends the process if it stood still since shortly before `began`, of `perf_counter`.

        To be called last, when the answers are made and before Triton has them.
        """
        # In this order: the other thread writes what it found before it beats.
        now, last = self._beat(), self._last
        woke, stood = self._woke, self._stood
        if (found := still(last, now)) > STILL_S:
            woke, stood = now.now, found
        if woke < began - WAKING_S:
            return
        try:
            self._tell(
                "warning",
                f"this process stood still for {stood:.1f} s (paused, without a CPU, or the clock "
                "was set); Triton may have given its batch up and would take the answer for "
                "another's: it ends, to be started again",
            )
        finally:
            os._exit(EXIT_CODE)  # at once: an orderly end would answer first

    def close(self) -> None:
        """Watches no more."""
        self._over.set()
        self._thread.join()

    def _live(self) -> None:
        while not self._over.wait(BEAT_S):
            now = self._beat()
            if (found := still(self._last, now)) > STILL_S:
                self._woke, self._stood = now.now, found
            self._last = now

    def _beat(self) -> Beat:
        return Beat(time.perf_counter(), time.time(), time.clock_gettime(self._clock))


def still(last: Beat, now: Beat) -> float:
    """Seconds between them in which the answering thread did not run."""
    return max(now.now - last.now, now.wall - last.wall) - (now.own - last.own)
