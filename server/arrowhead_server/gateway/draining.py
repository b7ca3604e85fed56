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
        self._is_draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._is_draining or not self._drain_s:
            super().handle_exit(sig, frame)
            return
        self._is_draining = True
        self.config.app.state.draining = True  # type: ignore[union-attr]  # it is a FastAPI
        timer = threading.Timer(self._drain_s, super().handle_exit, (sig, None))
        timer.daemon = True  # a second signal ends the wait
        timer.start()
