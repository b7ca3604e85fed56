# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from arrowhead_server import triton
from arrowhead_server.address import Address
from arrowhead_server.errors import StartError, TritonNotFoundError
from arrowhead_server.repository import EmbeddingModel
from arrowhead_server.triton import Triton, command_line, find_triton

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def executable(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `nvidia-pytriton` whose stub is a shell script; returns the stub."""
    package = tmp_path / "site-packages" / "pytriton"
    (package / "tritonserver" / "backends" / "python").mkdir(parents=True)
    spec = ModuleSpec("pytriton", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(triton, "find_spec", lambda _: spec)
    stubs = package / "tritonserver" / "python_backend_stubs"
    return executable(stubs / PYTHON / "triton_python_backend_stub")


def test_a_tritonserver_on_path_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = executable(tmp_path / "bin" / "tritonserver")
    monkeypatch.setenv("PATH", str(binary.parent))
    found = find_triton(tmp_path / "runtime")
    assert (found.binary, found.backends, found.caches) == (binary, None, None)
    assert found.environment["PATH"].split(":") == [
        str(Path(sys.executable).parent),
        str(binary.parent),
    ]
    assert not (tmp_path / "runtime").exists()


def test_the_embedded_backend_stands_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/mine")
    found = find_triton(tmp_path)
    assert found.binary.is_file()
    folder = tmp_path / "backends" / "python"
    assert {file.name for file in folder.iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    }
    assert (folder / "triton_python_backend_stub").resolve().parent.name == PYTHON
    libraries = found.environment["LD_LIBRARY_PATH"].split(":")
    assert libraries[0].endswith("/nvidia_pytriton.libs")
    assert libraries[-1] == "/opt/mine"


def test_no_triton_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    with pytest.raises(TritonNotFoundError, match=r"pip install 'arrowhead\[serve\]'"):
        find_triton(tmp_path)


def test_a_python_without_a_stub(fake_wheel: Path, tmp_path: Path) -> None:
    fake_wheel.unlink()
    with pytest.raises(TritonNotFoundError, match=f"no Python backend for Python {PYTHON}"):
        find_triton(tmp_path)


def test_a_missing_libpython_names_the_package(fake_wheel: Path, tmp_path: Path) -> None:
    loader = f"error while loading shared libraries: libpython{PYTHON}.so.1.0: cannot open"
    executable(fake_wheel, f"echo '{loader}' >&2; exit 127")
    with pytest.raises(TritonNotFoundError, match=f"apt-get install libpython{PYTHON}`"):
        find_triton(tmp_path)


def test_any_other_missing_library_is_named(fake_wheel: Path, tmp_path: Path) -> None:
    executable(fake_wheel, "echo 'error while loading shared libraries: libX.so.1' >&2; exit 127")
    with pytest.raises(TritonNotFoundError, match=r"cannot run: .*libX\.so\.1"):
        find_triton(tmp_path)


def options(*models: EmbeddingModel, verbose: bool = False) -> dict[str, str]:
    command = command_line(
        Triton(Path("tritonserver"), None, None, {}),
        Path("/models"),
        models,
        Address(http_port=1, grpc_port=2, metrics_port=3),
        shm_prefix="p-",
        verbose=verbose,
    )
    return dict(argument.partition("=")[::2] for argument in command[1:])


def test_listens_on_loopback_by_default() -> None:
    chosen = options()
    assert {chosen[f"--{part}-address"] for part in ("http", "grpc", "metrics")} == {"127.0.0.1"}
    assert [chosen[f"--{part}-port"] for part in ("http", "grpc", "metrics")] == ["1", "2", "3"]


def test_the_cache_holds_ten_thousand_vectors_of_each_model() -> None:
    # 1,617 bytes an entry were measured at 384 floats.
    one = int(
        options(EmbeddingModel("a", 384, 1, "a"))["--cache-config"].removeprefix("local,size=")
    )
    assert 10_000 * 1617 < one < 10_000 * 1617 * 1.1
    two = options(EmbeddingModel("a", 384, 1, "a"), EmbeddingModel("b", 384, 1, "b"))[
        "--cache-config"
    ]
    assert two == f"local,size={2 * one}"


def test_the_admin_key_is_new_each_time_and_cannot_be_sent() -> None:
    keys = {options()[flag] for flag in ("--http-restricted-api", "--grpc-restricted-protocol")}
    keys.add(options()["--http-restricted-api"])
    assert len(keys) == 3
    assert all("\n" in key for key in keys)


def test_the_command_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tritonclient', 'pytriton', 'arrowhead_engine'}"
    code = f"import sys, arrowhead_server.command; print({heavy} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"


OTLP = "http://collector.example:4318"


def test_a_small_share_is_one_that_triton_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", OTLP)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1e-309")
    found = Triton(Path("tritonserver"), None, None, {})
    command = command_line(found, Path("models"), (), Address(), shm_prefix="a", verbose=False)
    assert f"--trace-config=rate={2**31 - 1}" in command


def test_triton_is_told_a_whole_address_for_spans(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{OTLP}/")  # it would ask for //v1/traces
    found = find_triton(tmp_path / "runtime")
    assert found.environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == f"{OTLP}/v1/traces"


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": OTLP}, "0"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": f"{OTLP}/"}, "0"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{OTLP}/v1/traces"}, "0"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": OTLP, "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": OTLP, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": OTLP, "OTEL_TRACES_SAMPLER": "always_off"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": OTLP, "OTEL_TRACES_SAMPLER": "always_on"}, "1"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": OTLP,
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "0.01",
            },
            "100",
        ),
    ],
)
def test_triton_sends_spans_where_opentelemetrys_variables_say(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], flags: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = command_line(
        Triton(Path("tritonserver"), None, None, {}),
        Path("models"),
        (),
        Address(),
        shm_prefix="a",
        verbose=False,
    )
    met = [one.removeprefix("--trace-config=") for one in command if "trace-config" in one]
    wanted = [
        "mode=opentelemetry",
        f"rate={flags}",
        "level=TIMESTAMPS",
        "opentelemetry,resource=service.name=arrowhead-triton",
    ]
    assert met == ([] if flags is None else wanted)
    assert "collector.example" not in "".join(command)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:secret@host"}, "OTEL_EXPORTER_OTLP_HEADERS"),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{OTLP}/v1/traces?key=secret"},
            "OTEL_EXPORTER_OTLP_HEADERS",
        ),
        *(
            (
                {
                    "OTEL_EXPORTER_OTLP_ENDPOINT": OTLP,
                    "OTEL_TRACES_SAMPLER": "traceidratio",
                    "OTEL_TRACES_SAMPLER_ARG": told,
                },
                f"OTEL_TRACES_SAMPLER_ARG='{told}': wanted a number from 0 to 1",
            )
            for told in ("many", "2", "-0.1", "nan", "inf")
        ),
    ],
)
def test_variables_that_triton_cannot_follow(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=message) as raised:
        command_line(
            Triton(Path("tritonserver"), None, None, {}),
            Path("models"),
            (),
            Address(),
            shm_prefix="a",
            verbose=False,
        )
    assert "secret" not in str(raised.value)
