# SPDX-License-Identifier: Apache-2.0
"""Which Triton runs, in which environment and with which flags.

Two can be found, in this order:
1. `tritonserver` on PATH: a container's own. Nobody has one there by accident, and it is newer.
2. The one inside the `nvidia-pytriton` wheel (`pip install 'arrowhead[serve]'`), the default.
"""

import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from arrowhead_client import InvalidInput
from arrowhead_client._tracing import TRACES_ENDPOINT, endpoint, ratio
from arrowhead_server.address import Address
from arrowhead_server.errors import StartError, TritonNotFoundError
from arrowhead_server.repository import EmbeddingModel

CACHED_VECTORS = 10_000  # of each model
# Measured at 384 floats: 1,617 bytes an entry, so 81 on top of the floats; the rest is margin.
_CACHE_ENTRY_OVERHEAD_BYTES = 128
# Triton's own count of seconds before it gives up on open connections and in-flight requests. An
# idle keep-alive connection burns all of it, so it is also the usual time a stop takes.
EXIT_TIMEOUT_S = 3
_RAREST = 2**31 - 1  # Triton reads an int32
# Everything that changes the server or reaches into its memory. What stays open: health, metadata,
# inference, model configuration, statistics.
_ADMIN_APIS = "model-repository,shared-memory,trace,logging"
# An API cannot be switched off, only put behind a header that callers must send, and the header's
# value can be given nowhere but in argv, where any user of the machine reads it. Nobody needs the
# value, so it is drawn anew for every start, never kept, and holds a line feed, which always ends a
# header: even who reads it from argv has no way to send it.
_CLOSED = "arrowhead-closed={random}\n."


@dataclass(frozen=True)
class Triton:
    """A Triton that can run here.

    `backends` and `caches` are None where the binary's built-in defaults are right.
    """

    binary: Path
    backends: Path | None
    caches: Path | None
    environment: dict[str, str]


def find_triton(runtime: Path) -> Triton:
    """The Triton to run; an embedded one gets its folder of links under `runtime`.

    Raises:
        TritonNotFoundError: There is none, or none for this Python.
    """
    environment = dict(os.environ)
    if url := endpoint():  # Triton would make `//v1/traces` of a collector that ends in a slash
        environment[TRACES_ENDPOINT] = url
    # The Python backend's stub embeds an interpreter that becomes whatever `python3` comes first on
    # PATH: ours, so that models see the packages this process sees. Not resolved: following the
    # link out of a virtual environment would leave it.
    interpreter_folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join(
        [interpreter_folder, *filter(None, [environment.get("PATH")])]
    )
    on_path = shutil.which("tritonserver")
    if on_path:
        return Triton(Path(on_path), None, None, environment)
    return _embedded(runtime, environment)


def _embedded(runtime: Path, environment: dict[str, str]) -> Triton:
    # Found without importing it: `import pytriton` takes 1.7 s and reconfigures other libraries'
    # loggers, for three paths.
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise TritonNotFoundError(
            "no Triton found: run `pip install 'arrowhead[serve]'` for the embedded one "
            "(Linux x86-64), or put `tritonserver` on PATH"
        )
    package = Path(spec.submodule_search_locations[0])
    home = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise TritonNotFoundError(
            f"the embedded Triton has no Python backend for Python {version}: "
            f"use a Python from 3.10 to 3.12"
        )
    # The wheel keeps the stub of each Python apart, Triton wants this one beside the library.
    # Links do: nothing to copy (2 MB), and the stub's own RPATH follows the link home.
    backend = runtime / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (*(home / "backends" / "python").iterdir(), stub):
        (backend / file.name).symlink_to(file)

    libraries = [package.parent / "nvidia_pytriton.libs"]
    library = f"libpython{version}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        # Only when it is there: the folder of a system Python would put the system's libraries
        # before those that torch and numpy bring along.
        if folder and Path(folder, library).is_file() and not _is_system_folder(folder):
            libraries.append(Path(folder))
            break
    # Names in nvidia_pytriton.libs carry hashes, so no model picks one up by mistake.
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        [*map(str, libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    )
    _check_loadable(stub, environment, version)
    return Triton(home / "bin" / "tritonserver", runtime / "backends", home / "caches", environment)


def _is_system_folder(folder: str) -> bool:
    return Path(folder).resolve().is_relative_to("/usr/lib")


def _check_loadable(stub: Path, environment: dict[str, str], version: str) -> None:
    """Runs the stub without arguments: it prints its usage, or says which library it lacks."""
    result = subprocess.run([stub], env=environment, capture_output=True, text=True, check=False)
    if "error while loading shared libraries" not in result.stderr:
        return
    if "libpython" in result.stderr:
        raise TritonNotFoundError(
            f"Triton's Python backend needs libpython{version}.so.1.0, which this machine lacks: "
            f"run `apt-get install libpython{version}`, or use a Python built with --enable-shared"
        )
    raise TritonNotFoundError(f"Triton's Python backend cannot run: {result.stderr.strip()}")


def interpreter_warning() -> str | None:
    """A line to print if models may run under another Python than this one."""
    expected = Path(sys.executable).parent / "python3"
    if expected.exists():
        return None
    return (
        f"{expected} does not exist: models run under the python3 found first on PATH, which may "
        f"not see the packages installed here"
    )


def command_line(
    triton: Triton,
    repository: Path,
    models: tuple[EmbeddingModel, ...],
    address: Address,
    *,
    shm_prefix: str,
    verbose: bool,
) -> list[str]:
    """What to execute. Admin APIs are closed, every file in /dev/shm starts with `shm_prefix`."""
    cache_bytes = sum(
        CACHED_VECTORS * (4 * model.dimension + _CACHE_ENTRY_OVERHEAD_BYTES) for model in models
    )
    closed = f"{_ADMIN_APIS}:{_CLOSED.format(random=secrets.token_hex(16))}"
    return [
        str(triton.binary),
        f"--model-repository={repository}",
        *([f"--backend-directory={triton.backends}"] if triton.backends else []),
        *([f"--cache-directory={triton.caches}"] if triton.caches else []),
        f"--http-address={address.host}",
        f"--grpc-address={address.host}",
        f"--metrics-address={address.host}",
        f"--http-port={address.http_port}",
        f"--grpc-port={address.grpc_port}",
        f"--metrics-port={address.metrics_port}",
        f"--http-restricted-api={closed}",
        f"--grpc-restricted-protocol={closed}",
        # It serves what it is shown (shown.py) and looks again every second.
        "--model-control-mode=poll",
        "--repository-poll-secs=1",
        "--exit-on-error=true",
        # Strict, the server would be unready for ever once a version was refused or taken away.
        "--strict-readiness=false",
        # Our configurations are complete, and completing them would import every model twice.
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--cache-config=local,size={cache_bytes}",
        # The region's sizes stay at Triton's defaults: 1 MiB for each stub, growing by 1 MiB.
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--allow-metrics=true",
        *_trace_flags(os.environ),
        f"--log-info={'true' if verbose else 'false'}",
    ]


def _trace_flags(environment: Mapping[str, str]) -> list[str]:
    """What makes Triton send spans, if OpenTelemetry's variables ask for them.

    A request with a traceparent is always traced, whatever its flags say, so clients name a span
    only if it is sampled. Of the others Triton traces each `rate`th: none, unless
    OTEL_TRACES_SAMPLER says so in words, for the probes of every second are among them.

    Where to and with which headers it reads from the variables: argv is for all to see.

    Raises:
        StartError: a variable cannot be read, or holds what Triton would not send.
    """
    url = endpoint()
    sampler = environment.get("OTEL_TRACES_SAMPLER", "")
    if url is None or sampler == "always_off":
        return []
    place = urlsplit(url)
    if "@" in place.netloc or place.query:
        raise StartError(
            "the endpoint of traces has a user or a query in it, which Triton does not send: give "
            "what the collector asks for as OTEL_EXPORTER_OTLP_HEADERS=authorization=..."
        )
    try:
        kept = 1.0 if sampler.endswith("always_on") else ratio()
    except InvalidInput as error:
        raise StartError(str(error)) from None
    rate = round(min(1 / kept, _RAREST)) if kept else 0
    name = environment.get("OTEL_SERVICE_NAME", "arrowhead-triton")
    settings = [
        "mode=opentelemetry",
        f"rate={rate}",
        "level=TIMESTAMPS",
    ]
    settings.append(f"opentelemetry,resource=service.name={name}")
    if delay := environment.get("OTEL_BSP_SCHEDULE_DELAY"):
        settings.append(f"opentelemetry,bsp_schedule_delay={delay}")
    return [f"--trace-config={setting}" for setting in settings]
