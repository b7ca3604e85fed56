# SPDX-License-Identifier: Apache-2.0
"""The folder that Triton is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from arrowhead_server.repository import EmbeddingModel
from arrowhead_server.shown import Shown

TOY = EmbeddingModel("toy", 8, 1, "toy")


def config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def repository(make_repository: Callable[..., Path]) -> Path:
    repository = make_repository()
    (repository / "toy_encoder" / "warmup").mkdir()
    (repository / "toy_encoder" / "warmup" / "now").touch()
    (repository / "toy_encoder" / ".staging").mkdir()
    (repository / "half_tokenizer" / ".staging").mkdir(parents=True)
    for part in ("toy_tokenizer", "toy_encoder"):
        (repository / part / "2").mkdir()
        (repository / part / "2" / "model.py").write_text("# two")
    return repository


@pytest.fixture
def shown(repository: Path, tmp_path: Path) -> Shown:
    shown = Shown(repository, tmp_path / "shown")
    shown.clear()
    for part in TOY.parts:
        shown.show_part(part, 1)
    shown.show_ensemble(TOY)
    return shown


def test_only_what_is_served_is_in_it(shown: Shown, repository: Path) -> None:
    folder = shown.folder
    assert {path.name for path in folder.iterdir()} == {"toy", "toy_tokenizer", "toy_encoder"}
    encoder = folder / "toy_encoder"
    assert {path.name for path in encoder.iterdir()} == {"config.pbtxt", "1", "warmup"}
    assert (encoder / "1" / "weights.parquet").samefile(
        repository / "toy_encoder" / "1" / "weights.parquet"
    )


def test_what_the_configuration_names_is_a_copy(shown: Shown, repository: Path) -> None:
    """A link would let Triton see a change, and load all versions once more."""
    (repository / "toy_encoder" / "warmup" / "later").touch()
    assert not (shown.folder / "toy_encoder" / "warmup" / "later").exists()


def test_python_cannot_leave_compiled_code_in_a_version(shown: Shown) -> None:
    """Triton would take it for a change of the version and load it again."""
    assert (shown.folder / "toy_encoder" / "1" / "__pycache__").is_file()


def test_versions_come_and_go_and_the_others_stay_untouched(shown: Shown) -> None:
    encoder = shown.folder / "toy_encoder"
    before = (encoder / "1").stat(), (encoder / "config.pbtxt").stat()
    shown.show_part("toy_encoder", 2)
    assert ((encoder / "1").stat(), (encoder / "config.pbtxt").stat()) == before
    assert (encoder / "2" / "model.py").read_text() == "# two"
    shown.hide_part("toy_encoder", 1)
    assert {path.name for path in encoder.iterdir()} == {"config.pbtxt", "2", "warmup"}
    shown.hide_part("toy_encoder", 2)
    assert not encoder.exists()
    shown.show_part("toy_encoder", 1)
    assert (encoder / "1" / "model.py").exists()


def test_the_configuration_alone_says_which_version_of_an_ensemble_is_served(shown: Shown) -> None:
    ensemble = shown.folder / "toy"
    shown.show_ensemble(EmbeddingModel("toy", 8, 2, "toy"))
    assert {path.name for path in ensemble.iterdir()} == {"config.pbtxt", "1", "2"}
    met = config(ensemble)
    assert list(met.version_policy.specific.versions) == [2]
    assert {step.model_version for step in met.ensemble_scheduling.step} == {2}
    shown.hide_ensemble("toy")
    assert not ensemble.exists()


@pytest.mark.parametrize(
    "policy",
    [
        "version_policy: { specific { versions: [ 7, 8 ] } }",
        "version_policy { latest { num_versions: 2 } }",
        "version_policy: { all: { } }",
        "version_policy {\n  specific: {\n    versions: 3\n  }\n}",
    ],
)
def test_any_policy_of_the_repositorys_gives_way(
    repository: Path, tmp_path: Path, policy: str
) -> None:
    for part in ("toy", "toy_encoder"):
        path = repository / part / "config.pbtxt"
        path.write_text(f"{path.read_text()}\n{policy}\n")
    shown = Shown(repository, tmp_path / "shown")
    shown.clear()
    shown.show_part("toy_encoder", 1)
    shown.show_ensemble(TOY)
    assert config(shown.folder / "toy_encoder").version_policy.HasField("all")
    assert list(config(shown.folder / "toy").version_policy.specific.versions) == [1]
