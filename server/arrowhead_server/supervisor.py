# SPDX-License-Identifier: Apache-2.0
"""A Triton that is kept running: started, watched, restarted, stopped.

One thread does all of that, in this order:

    start ──▶ watch ──▶ recover ──▶ watch ──▶ ...
      │         │          └ five starts in a row failed: CrashLoopError
      │         └ `stop` was asked for: ask Triton to end, then kill what is left
      └ the first start failed: StartError, no second try

Everything it waits for (the end of a process, the answer of a probe, the wish to stop) wakes one
`select`. What it raises comes out of `start`, `wait` or `stop`.
"""

import logging
import os
import secrets
import select
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from arrowhead_server import health, triton
from arrowhead_server.address import Address, check_ports, free_address
from arrowhead_server.errors import (
    CrashLoopError,
    ServerError,
    StartError,
    TritonNotFoundError,
)
from arrowhead_server.health import Condition
from arrowhead_server.log import Log, is_for_operators, read
from arrowhead_server.logs import from_part
from arrowhead_server.probe import Pulse
from arrowhead_server.process import Janitor, TritonProcess
from arrowhead_server.repository import EmbeddingModel, read_repository
from arrowhead_server.rollout import Rollout, State, parts

if TYPE_CHECKING:
    from arrowhead_server.admission import Admission

LOGGER = logging.getLogger(__name__)
TRITON_LOGGER = logging.getLogger(f"{__name__}.triton")

_Answer = TypeVar("_Answer")

START_TIMEOUT_S = 300.0  # large models on slow disks
READINESS_POLL_S = 0.02
LONGEST_WAIT_S = 1.0  # of the supervising thread, so that it is seen to be alive
LOOK_INTERVAL_S = 1.0  # between two looks at the repository; Triton takes its own as often
SECOND_LOOK_S = 0.2  # after a probe that failed
MAX_FAILED_STARTS = 5
# A server that lived this long was well; one that dies sooner waits before it starts again.
STABLE_AFTER_S = 10.0
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 15.0


@dataclass(frozen=True)
class Restart:
    """One recovery: why, and the seconds from noticing the failure to a proven answer."""

    reason: str
    recovery_s: float


class Server:
    """Triton on a model repository, restarted when a process dies or a model stops answering.

    Args:
        repository: The folder that Triton serves.
        address: Where it listens. Loopback unless told otherwise.
        verbose: Pass Triton's whole log on, and a line for each batch; otherwise its errors and
            what models print.
        public_key: File of the key that every version must be signed with; None asks for none.
        probe_interval_s: Seconds between two probes of every model.
        probe_timeout_s: Seconds until a probe counts as unanswered. A model that completes nothing
            at all for about three times this long is restarted, so it must exceed the time that
            the largest batch takes.
        drain_s: Seconds from `request_drain` to the end, in which it still answers.

    Attributes:
        ready_s: Seconds that the last start took, to a real answer of every model.
        restarts: Every recovery so far, oldest first.

    Raises:
        RepositoryError: There is nothing to serve, or the public key cannot be used.
        TritonNotFoundError: This is not Linux.
    """

    def __init__(
        self,
        repository: Path,
        address: Address,
        *,
        verbose: bool = False,
        public_key: Path | None = None,
        probe_interval_s: float = 1.0,
        probe_timeout_s: float = 10.0,
        drain_s: float = 0.0,
    ) -> None:
        if sys.platform != "linux":
            raise TritonNotFoundError("Triton runs on Linux only: use the container elsewhere")
        self.repository = repository.resolve()
        self.address = address
        read_repository(self.repository)
        self.ready_s = 0.0
        self.restarts: list[Restart] = []
        self._verbose = verbose
        self._public_key = public_key
        self._probe_interval_s = probe_interval_s
        self._probe_timeout_s = probe_timeout_s
        # Distinct between servers side by side, so that each removes its own files only.
        self._shm_prefix = f"arrowhead-{os.getpid()}-{secrets.token_hex(4)}-"
        self._process: TritonProcess | None = None
        self._pulse = Pulse(address, (), probe_timeout_s)
        self._rollout: Rollout | None = None
        self._look: Future[State] | None = None  # at the repository; under way, or not taken yet
        self._turned_at = time.monotonic()
        self._log = Log()
        self._early_deaths = 0
        self._drain_s = drain_s
        self._drained_at: float | None = None
        self._down_because = ""
        self._ends_because = "it was asked to stop"
        self._is_up = False
        self._stopping = False
        self._ready_or_over = Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arrowhead-supervisor")
        self._life: Future[None] | None = None

    @property
    def models(self) -> tuple[EmbeddingModel, ...]:
        """What is served now."""
        rollout = self._rollout
        return rollout.models if rollout is not None else read_repository(self.repository)

    @property
    def http_url(self) -> str:
        """Where HTTP inference is served."""
        return f"http://{self.address.local_host}:{self.address.http_port}"

    @property
    def grpc_url(self) -> str:
        """Where gRPC inference is served."""
        return f"grpc://{self.address.local_host}:{self.address.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds Triton's metrics."""
        return f"http://{self.address.local_host}:{self.address.metrics_port}/metrics"

    @property
    def health_url(self) -> str:
        """Where balancers ask; `/live`, `/ready` and `/metrics` lie below it."""
        return f"http://{self.address.local_host}:{self.address.health_port}"

    @property
    def restart_count(self) -> int:
        """How often Triton was started anew."""
        return len(self.restarts)

    @property
    def recovery_s(self) -> float:
        """The seconds that all restarts took together."""
        return sum(restart.recovery_s for restart in self.restarts)

    def condition(self) -> tuple[Condition, str]:
        """What it is doing, and why it is not ready ("" if it is). May be called by any thread."""
        drained_at = self._drained_at
        if self._stopping:
            return Condition.STOPPING, self._ends_because
        if drained_at is not None:
            left_s = max(drained_at - time.monotonic(), 0.0)
            return Condition.DRAINING, f"it was asked to stop, and does in {left_s:.1f} s"
        if not self._is_up and self._down_because:
            return Condition.RECOVERING, self._down_because
        if not self._is_up:
            return Condition.STARTING, "not every model has answered yet"
        if (hanging := self._pulse.hanging()) is not None:
            return Condition.HANGING, hanging
        return Condition.READY, ""

    def silent_s(self) -> float:
        """The seconds since the supervising thread last did anything. May be called by any thread.

        About one while it runs. Triton may be well meanwhile, but nobody would notice its death.
        """
        return time.monotonic() - self._turned_at

    @property
    def shm_prefix(self) -> str:
        """How the names of this server's files in /dev/shm begin."""
        return self._shm_prefix

    @property
    def pid(self) -> int:
        """The process id of tritonserver now, or 0 while none runs."""
        process = self._process
        return process.pid if process is not None else 0

    def stub_pids(self) -> dict[str, list[int]]:
        """The process ids of the Python backend's stubs, by model; empty while none is up."""
        process = self._process
        return process.stub_pids() if process is not None else {}

    def start(self) -> bool:
        """Starts, and returns True once every model has answered a real inference.

        Returns False if `request_stop` came first.

        Raises:
            ServerError: It did not come up; the message says why.
        """
        self._life = self._thread.submit(self._live)
        self._life.add_done_callback(lambda _: self._ready_or_over.set())
        self._ready_or_over.wait()
        if self._life.done():
            self._life.result()
        return self._is_up

    def wait(self) -> None:
        """Blocks until the server has stopped.

        Raises:
            CrashLoopError: It died and did not come back.
        """
        if self._life is not None:
            self._life.result()

    def request_stop(self) -> None:
        """Asks for the end without waiting for it. Safe in a signal handler: takes no lock."""
        self._stopping = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def request_drain(self) -> None:
        """Asks for the end `drain_s` seconds from now; asked again, or before it is up, for now.

        `/ready` says no from this moment, so that balancers send nothing new by then; what they do
        send is still answered. Safe in a signal handler.
        """
        if self._drained_at is not None or not self._is_up or not self._drain_s:
            self.request_stop()
            return
        self._drained_at = time.monotonic() + self._drain_s
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Stops within five seconds and leaves nothing behind. May be called twice.

        Raises:
            CrashLoopError: It had already died for good.
        """
        self.request_stop()
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            wake, self._wake = self._wake, -1
            if wake >= 0:
                os.close(wake)

    def _live(self) -> None:
        """What the supervising thread does from beginning to end."""
        with ExitStack() as stack:
            # First in, last out: it tells of the end, too.
            stack.enter_context(health.serving(self, self.address))
            runtime = Path(tempfile.mkdtemp(prefix="arrowhead-"))
            janitor = stack.enter_context(Janitor(runtime, self._shm_prefix))
            prober = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="probe"))
            looker = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="rollout"))
            # Runs before the exit of these two, which wait for questions that may hang in a dead
            # Triton.
            stack.callback(self._end)
            found = triton.find_triton(runtime)
            # Processes of one model share memory through it. A restart finds what is in it again.
            found.environment["ARROWHEAD_SHARED"] = str(runtime / "shared")
            (runtime / "shared").mkdir(mode=0o700)
            if self._verbose:
                found.environment["ARROWHEAD_LOG_BATCHES"] = "1"  # a line for each, of each model
            rollout = self._rollout = Rollout(
                self.repository, runtime / "models", self._admission(runtime / "signed")
            )
            start = partial(self._start_once, found, rollout, janitor, prober)
            start()
            began = time.monotonic()
            while not self._stopping and (reason := self._watch(prober, looker, rollout)):
                if self._drained_at is not None:
                    break  # it has died; what would be started would be stopped at once
                self._recover(reason, start, lived_s=time.monotonic() - began)
                began = time.monotonic()

    def _admission(self, folder: Path) -> "Admission | None":
        if self._public_key is None:
            return None
        from arrowhead_server.admission import Admission  # protobuf and cryptography: half a second

        return Admission(self.repository, folder, self._public_key)

    def _start_once(
        self, found: triton.Triton, rollout: Rollout, janitor: Janitor, prober: ThreadPoolExecutor
    ) -> None:
        """One try: returns once every model has answered, or once `stop` was asked for."""
        began = time.monotonic()
        check_ports(self.address)
        self._log = Log()
        # A look at the last one may be under way, which may not run beside `begin`.
        rollout.leave_off()
        if self._look is not None:
            wait([self._look])
            self._look = None
        rollout.begin(lambda _: self._turn())
        command = triton.command_line(
            found,
            rollout.shown.folder,
            rollout.models,
            self.address,
            shm_prefix=self._shm_prefix,
            verbose=self._verbose,
        )
        process = TritonProcess(command, found.environment, janitor, self._wake, self._on_line)
        self._process = process
        self._pulse = pulse = Pulse(self.address, rollout.models, self._probe_timeout_s)
        while not pulse.is_ready():
            ended = process.wait(READINESS_POLL_S)
            self._turn()
            if self._stopping:
                return
            if ended is not None or self._log.is_fatal:
                cause = self._log.cause() or f"{ended} before it was ready"
                raise StartError(f"{cause}{_way_back(rollout.unloadable())}")
            if time.monotonic() - began > START_TIMEOUT_S:
                raise StartError(f"Triton was not ready within {START_TIMEOUT_S:.0f} s")
        rollout.begun()
        process.watch_stubs(rollout.live(rollout.state))
        first = self._ask(prober, pulse.failures)
        while not first.done():
            ended = process.wait(LONGEST_WAIT_S)
            self._turn()
            if ended is not None:
                raise StartError(f"{ended} at its first inference")
            if self._stopping:
                return
        for (part, version), error in first.result().items():
            of_it = [m for m in rollout.models if part in m.parts and m.version == version]
            raise StartError(
                f"model '{part}' is loaded but does not answer: {error}{_way_back(of_it)}"
            )
        self.ready_s = time.monotonic() - began
        self._is_up = True
        self._ready_or_over.set()

    def _watch(
        self, prober: ThreadPoolExecutor, looker: ThreadPoolExecutor, rollout: Rollout
    ) -> str | None:
        """Returns why the server must be restarted, or None once `stop` was asked for."""
        process, pulse = self._process, self._pulse
        assert process is not None  # noqa: S101 (tells the type checker)
        probe: Future[str | None] | None = None
        next_probe = time.monotonic() + self._probe_interval_s
        next_look = time.monotonic() + LOOK_INTERVAL_S
        while not self._stopping:
            # A question that is being asked wakes us with its answer.
            due = [LONGEST_WAIT_S]
            due += [] if probe else [next_probe - time.monotonic()]
            due += [] if self._look else [next_look - time.monotonic()]
            if self._drained_at is not None:
                if (left_s := self._drained_at - time.monotonic()) <= 0:
                    return None
                due.append(left_s)
            ended = process.wait(min(due))
            self._turn()
            if ended is not None:
                return ended
            if self._look is None:
                if time.monotonic() >= next_look:
                    self._look = self._ask(looker, partial(rollout.look, pulse))
            elif self._look.done():
                if (error := self._look.exception()) is None:
                    self._follow(self._look.result(), rollout, process, pulse)
                else:  # whatever it is, what is served goes on
                    LOGGER.error("the repository is not followed: %r", error)
                if rollout.restart:
                    return rollout.restart
                self._look, next_look = None, time.monotonic() + LOOK_INTERVAL_S
            if probe is None:
                if time.monotonic() >= next_probe:
                    probe = self._ask(prober, pulse.beat)
            elif probe.done():
                if (verdict := probe.result()) is not None:
                    return verdict
                probe = None
                pause_s = SECOND_LOOK_S if pulse.is_suspicious else self._probe_interval_s
                next_probe = time.monotonic() + min(pause_s, self._probe_interval_s)
        return None

    def _follow(self, state: State, rollout: Rollout, process: TritonProcess, pulse: Pulse) -> None:
        """Shows Triton the next state; takes leave first of the processes that will end."""
        process.watch_stubs(rollout.live(state))
        if state != rollout.state:
            rollout.apply(state)
        process.kill_stubs(parts(rollout.hanging))
        rollout.hanging.clear()
        pulse.models = rollout.models

    def _recover(self, reason: str, start: Callable[[], None], *, lived_s: float) -> None:
        """Kills what is left and starts anew on the same ports, until it answers again.

        Raises:
            CrashLoopError: Too many starts in a row failed.
        """
        noticed = time.monotonic()
        self._down_because = reason
        self._is_up = False
        LOGGER.warning("restarting Triton: %s", reason)
        self._early_deaths = self._early_deaths + 1 if lived_s < STABLE_AFTER_S else 0
        failed_starts = 0
        while not self._stopping:
            self._kill()
            self._pause(max(self._early_deaths - 1, 0) + failed_starts)
            try:
                start()
            except ServerError as error:
                failed_starts += 1
                LOGGER.warning("start %d of %d: %s", failed_starts, MAX_FAILED_STARTS, error)
                if failed_starts == MAX_FAILED_STARTS:
                    raise CrashLoopError(
                        f"gave up after {failed_starts} failed starts in a row: {error}"
                    ) from error
                continue
            if self._is_up:
                self.restarts.append(Restart(reason, time.monotonic() - noticed))
                LOGGER.warning("Triton answers again after %.2f s", self.restarts[-1].recovery_s)
                return

    def _turn(self) -> None:
        self._turned_at = time.monotonic()

    def _pause(self, count: int) -> None:
        """Waits longer the more went wrong in a row, not at all the first time."""
        delay_s = min(FIRST_DELAY_S * 2 ** (count - 1), MAX_DELAY_S) if count else 0.0
        deadline = time.monotonic() + delay_s
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wake], [], [], min(left, LONGEST_WAIT_S))[0]:
                os.eventfd_read(self._wake)
            self._turn()

    def _end(self) -> None:
        is_up, self._is_up = self._is_up, False
        is_asked_to = self._stopping or self._drained_at is not None
        if not is_asked_to:
            self._ends_because = "it did not come up, or not again"
        self._stopping = True
        if self._rollout is not None:
            self._rollout.leave_off()  # its thread is waited for
        if is_up and is_asked_to and self._process is not None:
            self._process.end_gracefully(triton.EXIT_TIMEOUT_S)
        self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _ask(self, prober: ThreadPoolExecutor, question: Callable[[], _Answer]) -> Future[_Answer]:
        """Runs `question` beside us; its answer or its exception wakes the wait for the rest."""
        answer = prober.submit(question)
        answer.add_done_callback(lambda _: os.eventfd_write(self._wake, 1))
        return answer

    def _on_line(self, line: str) -> None:
        self._log.add(line)
        if self._rollout is not None:
            self._rollout.hear(line)
        if self._verbose or (self._is_up and is_for_operators(line)):
            told = read(line)
            TRITON_LOGGER.log(
                told.level, "%s", told.message, extra=from_part(told.part, told.fields)
            )


def _way_back(models: Collection[EmbeddingModel]) -> str:
    """What to do about models that do not come up, where something came before them."""
    for model in models:
        if model.name != model.base:
            return f"; end its candidacy with `arrowhead rollback {model.base} --candidate`"
        if model.version > 1:
            return f"; go back to an earlier version with `arrowhead rollback {model.base}`"
    return ""


@contextmanager
def running_server(
    repository: Path,
    address: Address | None = None,
    *,
    verbose: bool = False,
    public_key: Path | None = None,
    probe_interval_s: float = 1.0,
    probe_timeout_s: float = 10.0,
) -> Iterator[Server]:
    """A `Server` that answers, on free loopback ports unless told otherwise; stopped at the end.

    Raises:
        ServerError: It did not come up, or died for good meanwhile.
    """
    server = Server(
        repository,
        address or free_address(),
        verbose=verbose,
        public_key=public_key,
        probe_interval_s=probe_interval_s,
        probe_timeout_s=probe_timeout_s,
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()
