# SPDX-License-Identifier: Apache-2.0
"""An end that balancers hear of before it comes."""

from __future__ import annotations

import threading
from types import FrameType

import uvicorn


class DrainingServer(uvicorn.Server):
    """After a first signal it answers on for `drain_s` seconds, with `app.state.draining` set."""

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._timer: threading.Timer | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._timer is None and self._drain_s:
            self.config.app.state.draining = True  # type: ignore[union-attr]  # it is a FastAPI
            self._timer = threading.Timer(self._drain_s, super().handle_exit, (sig, None))
            self._timer.daemon = True  # a second signal ends the wait
            self._timer.start()
            return
        if self._timer is not None:
            self._timer.cancel()  # a third one would cut what is under way
        super().handle_exit(sig, frame)
