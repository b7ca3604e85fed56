# SPDX-License-Identifier: Apache-2.0
"""One life of a tritonserver, and the janitor that sweeps up if we are killed.

Triton leads a process group of its own, in which its Python stubs stay too, so one signal reaches
all of them. A stub that hangs outlives a dead Triton, and a killed Triton leaves its shared memory
behind, so an end is always: kill the group, wait until it is empty, remove the files.
"""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType

import psutil

from arrowhead_server.errors import StartError

_SHM = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory lives on Linux)
_STUB = "triton_python_backend_stub"
_KILL_BOUND_S = 2.0
# $1: folder to remove, $2: prefix in /dev/shm. Each line read names the process group now alive, or
# is empty. The end of the input means that the supervisor is gone. A killed process may live on for
# a moment in a system call that creates a file, so wait (up to 2 s) before sweeping.
_JANITOR = """
group=
while read -r line; do group=$line; done
if [ -n "$group" ]; then
    tries=0
    while kill -s KILL -- "-$group" 2>/dev/null && [ $tries -lt 40 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
fi
rm -rf -- "$1" /dev/shm/"$2"*
"""
# Triton's group enters its number into the janitor's pipe before Triton exists, then lets go of the
# pipe: there is no moment at which a killed supervisor leaves a Triton that the janitor has not
# heard of. (PR_SET_PDEATHSIG would reach neither hanging stubs nor /dev/shm, and fires when the
# thread that started Triton ends.)
_LAUNCH = 'echo $$ >&0 && exec "$@" </dev/null'


class Janitor:
    """Owns `runtime` and the files of `shm_prefix`; removes both, even if this process is killed.

    A context manager. A shell that sleeps in a read: 1 MB, no CPU.
    """

    def __init__(self, runtime: Path, shm_prefix: str) -> None:
        self._runtime = runtime
        self._shm_prefix = shm_prefix
        reader, self.pipe = os.pipe()
        try:
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _JANITOR, "arrowhead-janitor", str(runtime), shm_prefix],
                stdin=reader,
                # Ours may be a pipe whose reader waits for its end.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the terminal is for us
            )
        finally:
            os.close(reader)

    def __enter__(self) -> "Janitor":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self.pipe)
        self.remove_shared_memory()
        shutil.rmtree(self._runtime, ignore_errors=True)

    def forget_group(self) -> None:
        """The group last entered is gone: its number may soon be somebody else's."""
        # A janitor that somebody killed is no reason to fail; all it does is insurance.
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipe, b"\n")

    def remove_shared_memory(self) -> None:
        """Removes what a killed group left in /dev/shm."""
        for file in _SHM.glob(f"{self._shm_prefix}*"):
            file.unlink(missing_ok=True)


class TritonProcess:
    """A running tritonserver. Created is started; `kill` must follow, whatever happens.

    Args:
        command: From `triton.command_line`.
        environment: From `triton.find_triton`.
        janitor: Told of the process group.
        wake: An eventfd that ends a `wait` early.
        on_line: Gets every line that Triton or a model prints.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        janitor: Janitor,
        wake: int,
        on_line: Callable[[str], None],
    ) -> None:
        self._janitor = janitor
        self._wake = wake
        self._on_line = on_line
        self._unfinished = b""
        self._stubs: dict[int, tuple[int, str, int]] = {}  # pidfd -> pid, model, version
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _LAUNCH, "arrowhead-triton", *command],
            stdin=janitor.pipe,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None  # noqa: S101 (tells the type checker)
        self._log = self._process.stdout.fileno()
        os.set_blocking(self._log, False)
        self._pidfd = os.pidfd_open(self.pid)
        for fd in (self._log, self._pidfd, wake):
            self._selector.register(fd, selectors.EVENT_READ)

    def wait(self, timeout_s: float) -> str | None:
        """Waits until Triton or a stub ends, or something needs a look; says who ended and how.

        Returns None after `timeout_s` seconds, and earlier when `wake` or a log line came.
        """
        ready = {key.fd for key, _ in self._selector.select(max(timeout_s, 0.0))}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._log in ready:
            self._read_log()
        # Triton first: its stubs die with it, and that is not what happened.
        if self._pidfd in ready:
            return f"tritonserver {_how_it_ended(self._process.wait())}"
        for fd in ready & self._stubs.keys():
            pid, model, _ = self._stubs[fd]
            return f"the process of model '{model}' (pid {pid}) died"
        return None

    def watch_stubs(self, served: Collection[tuple[str, int]]) -> None:
        """From now on `wait` reports the end of the stubs of these models' versions, and no other.

        Those of a version that is still loading, or is about to be unloaded, may end as they like.
        """
        for fd, (_, *known) in list(self._stubs.items()):
            if tuple(known) not in served:
                self._selector.unregister(fd)
                os.close(fd)
                del self._stubs[fd]
        watched = {pid for pid, _, _ in self._stubs.values()}
        for stub, version in self._stub_processes():
            if version in served and stub.pid not in watched:
                with contextlib.suppress(ProcessLookupError):
                    fd = os.pidfd_open(stub.pid)
                    self._stubs[fd] = (stub.pid, *version)
                    self._selector.register(fd, selectors.EVENT_READ)

    def kill_stubs(self, versions: Collection[tuple[str, int]]) -> None:
        """Ends the processes of versions that hang while they load."""
        for stub, version in self._stub_processes() if versions else ():
            if version in versions:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stub.kill()

    def _stub_processes(self) -> Iterator[tuple[psutil.Process, tuple[str, int]]]:
        """The stubs that live now, and the version of a model that each is for."""
        for stub in psutil.Process(self.pid).children():
            # IndexError: a child that ends, or has not become the stub yet, has no arguments.
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
                arguments = stub.cmdline()
                if Path(arguments[0]).name == _STUB:
                    # repository / model / version / model.py
                    folder = Path(arguments[1]).parent
                    yield stub, (folder.parent.name, int(folder.name))

    def stub_pids(self) -> dict[str, list[int]]:
        """The process ids of the stubs of each model."""
        pids: dict[str, list[int]] = {}
        for pid, model, _ in list(self._stubs.values()):  # may be asked from another thread
            pids.setdefault(model, []).append(pid)
        return pids

    def end_gracefully(self, bound_s: float) -> None:
        """Asks Triton to finish what is in flight; returns when it has or `bound_s` seconds passed.

        `kill` is still to be called.
        """
        self._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + bound_s
        while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
            # Triton unloads models only after the requests in flight, so the end of the first stub
            # means there are none; it would go on for 1-2 s, or in vain if the stub was dead.
            if self.wait(left) is not None:
                return

    def kill(self) -> None:
        """Kills the whole group at once and removes what it leaves. May be called twice.

        Raises:
            StartError: Something of the group is still alive after two seconds.
        """
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _KILL_BOUND_S
        while survivors := self._group_members():
            if time.monotonic() > deadline:
                raise StartError(f"processes {survivors} of Triton do not die, even when killed")
            time.sleep(0.005)  # they are killed; what is left is the kernel's work
        self._janitor.forget_group()
        self._janitor.remove_shared_memory()
        self._read_log()
        self._close()

    def _group_members(self) -> list[int]:
        with contextlib.suppress(ChildProcessError):
            # As the first process of a container we inherit orphaned stubs: nobody else reaps them.
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == self.pid and not _is_zombie(process):
                    members.append(process.pid)
        return members

    def _read_log(self) -> None:
        try:
            while data := os.read(self._log, 65536):
                *lines, self._unfinished = (self._unfinished + data).split(b"\n")
                for line in lines:
                    self._on_line(line.decode(errors="replace"))
        except BlockingIOError:
            return  # all read for now
        # End of the file: without this, `select` would report it for ever.
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._log)

    def _close(self) -> None:
        self._selector.close()
        for fd in self._stubs:
            os.close(fd)
        self._stubs.clear()
        os.close(self._pidfd)
        self._pidfd = -1
        if self._process.stdout is not None:
            self._process.stdout.close()


def _is_zombie(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_ZOMBIE)


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
