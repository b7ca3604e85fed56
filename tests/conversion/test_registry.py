# SPDX-License-Identifier: Apache-2.0
"""The registry's operations on disk, and its commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from arrowhead_client.cli import main
from arrowhead_conversion import pins, registry, repository
from arrowhead_conversion.convert import convert
from arrowhead_conversion.errors import Busy, RegistryError
from arrowhead_engine.errors import EngineError

from .conftest import edit

PROMPTS = {"query": 'say "query": \\ \n', "document": "", "naïve": "クエリ: "}


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with three versions, of which the first is live."""
    source = shutil.copytree(tiny_model, tmp_path_factory.mktemp("source") / "tiny")
    edit(source / "config_sentence_transformers.json", prompts=PROMPTS)
    out = tmp_path_factory.mktemp("registry") / "models"
    for _ in range(3):
        convert(str(source), "tiny", out, promote=False, progress=False)
    return out


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "models")


def config(folder: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def served(models: Path, name: str = "tiny") -> tuple[list[int], set[int], list[int]]:
    """Versions of the ensemble, its pins, and versions of both its parts."""
    ensemble = config(models / name)
    parts = [
        list(config(models / f"tiny_{part}").version_policy.specific.versions)
        for part in ("tokenizer", "encoder")
    ]
    assert parts[0] == parts[1]
    pinned = {step.model_version for step in ensemble.ensemble_scheduling.step}
    return list(ensemble.version_policy.specific.versions), pinned, parts[0]


def roles(models: Path) -> dict[int, str]:
    return {entry.version: entry.role for entry in registry.entries(models)}


def test_a_first_version_is_live_and_later_ones_wait_if_asked_to(models: Path) -> None:
    assert served(models) == ([1], {1}, [1])
    assert roles(models) == {1: "live", 2: "idle", 3: "idle"}


def test_promote_and_rollback(models: Path) -> None:
    assert registry.promote(models, "tiny") == (3, 1)
    assert served(models) == ([3], {3}, [3])
    assert registry.promote(models, "tiny", 2) == (2, 3)
    assert registry.rollback(models, "tiny") == (3, 2)
    assert registry.rollback(models, "tiny") == (2, 3)
    assert registry.promote(models, "tiny", 2) == (2, 2)  # again: what was before stays known
    assert registry.rollback(models, "tiny") == (3, 2)


def test_there_is_nothing_before_the_first(models: Path) -> None:
    with pytest.raises(RegistryError, match="version 1 is the first that was live"):
        registry.rollback(models, "tiny")


def test_a_candidate(models: Path) -> None:
    assert registry.propose(models, "tiny", 2) == 2
    assert served(models) == ([1], {1}, [1, 2])
    assert served(models, "tiny_candidate") == ([2], {2}, [1, 2])
    assert config(models / "tiny_candidate").name == "tiny_candidate"
    assert roles(models) == {1: "live", 2: "candidate", 3: "idle"}
    registry.promote(models, "tiny", 3)
    assert served(models) == ([3], {3}, [2, 3])
    registry.promote(models, "tiny", 2)
    assert served(models) == ([2], {2}, [2])
    assert not (models / "tiny_candidate").exists()
    with pytest.raises(RegistryError, match="version 2 is live already"):
        registry.propose(models, "tiny", 2)
    registry.propose(models, "tiny")
    assert registry.withdraw(models, "tiny") == 3
    assert served(models) == ([2], {2}, [2])
    with pytest.raises(RegistryError, match="has no candidate"):
        registry.withdraw(models, "tiny")


def test_a_users_own_settings_and_comments_stay(models: Path) -> None:
    path = models / "tiny_encoder" / "config.pbtxt"
    path.write_text(path.read_text().replace('"auto"', '"float32"') + "# mine\n")
    registry.promote(models, "tiny", 2)
    text = path.read_text()
    assert "# mine" in text
    assert config(path.parent).parameters["compute_dtype"].string_value == "float32"
    assert "# No queue policy" in text


def test_prompts_are_in_the_served_configuration(models: Path) -> None:
    for version in (1, 2, 1):
        registry.promote(models, "tiny", version)
        met = config(models / "tiny").parameters
        assert {
            key.removeprefix("prompt."): value.string_value
            for key, value in met.items()
            if key.startswith("prompt.")
        } == PROMPTS


def test_a_broken_version_is_not_promoted(models: Path) -> None:
    path = models / "tiny_encoder" / "2" / "weights.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    before = (models / "tiny" / "config.pbtxt").read_text()
    for change in (registry.promote, registry.propose):
        with pytest.raises(EngineError):
            change(models, "tiny", 2)
    assert (models / "tiny" / "config.pbtxt").read_text() == before
    assert not (models / "tiny_candidate").exists()
    broken = next(e for e in registry.entries(models) if e.version == 2)
    assert "the end is missing" in broken.fault


def test_remove(models: Path) -> None:
    registry.propose(models, "tiny", 2)
    for version, role in ((1, "live"), (2, "candidate")):
        with pytest.raises(RegistryError, match=f"version {version} is {role}"):
            registry.remove(models, "tiny", version)
    registry.remove(models, "tiny", 3)
    assert roles(models) == {1: "live", 2: "candidate"}
    with pytest.raises(RegistryError, match="no version 3; versions there: 1, 2"):
        registry.remove(models, "tiny", 3)
    registry.remove(models, "tiny")
    assert list(models.iterdir()) == []
    with pytest.raises(RegistryError, match="no model 'tiny'"):
        registry.remove(models, "tiny")


def test_a_number_is_not_given_out_twice(models: Path, tiny_model: Path) -> None:
    """A running server may still hold vectors of the version that was removed."""
    registry.remove(models, "tiny", 3)
    assert convert(str(tiny_model), "tiny", models, promote=False, progress=False).version == 4
    registry.promote(models, "tiny", 2)
    registry.remove(models, "tiny", 4)
    assert convert(str(tiny_model), "tiny", models, progress=False).version == 5


@pytest.mark.parametrize("name", ["../models/tiny", "tiny/../tiny", ".tiny", ""])
def test_a_name_does_not_leave_the_repository(models: Path, name: str) -> None:
    from arrowhead_conversion.errors import InvalidName

    with pytest.raises(InvalidName):
        registry.remove(models, name)


def test_what_a_removal_left_is_no_model(models: Path) -> None:
    (models / "tiny_encoder").rename(models / ".removed-tiny_encoder")
    assert registry.entries(models) == []


COMMENTED = """# version_policy: { all { } } is what was here
name:"m"   # no blank
platform: "ensemble"
# before: version_policy: { latest { num_versions: 1 } }
max_batch_size: 100
version_policy < # mine
  specific: < versions: [ 7 ] >
>
ensemble_scheduling { step [
  { model_name: "m_tokenizer" model_version: -1 },
  { model_name: "m_encoder", model_version: -1 }  # model_version: 3
] }
parameters: { key: "prompt.old" value: { string_value: "model_version: 7 { [ \\\\" } }
parameters { key: "previous_version" value { string_value: "5" } }"""


def test_edits_know_comments_strings_and_both_kinds_of_brackets() -> None:
    assert pins.pins(COMMENTED) == {-1}
    text = pins.with_facts(COMMENTED, {"prompt.new": "a {", pins.PREVIOUS: "6"})
    text = pins.with_name(pins.with_versions(pins.with_pin(text, 2), [2]), "m_candidate")
    met = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert met.name == "m_candidate"
    assert met.max_batch_size == 100
    assert list(met.version_policy.specific.versions) == [2]
    assert {step.model_version for step in met.ensemble_scheduling.step} == {2}
    values = {key: value.string_value for key, value in met.parameters.items()}
    assert values == {"prompt.new": "a {", "previous_version": "6"}
    for comment in (
        "# version_policy: { all { } } is what was here",
        "# no blank",
        "# before: ver",
    ):
        assert comment in text


def test_an_edit_that_triton_could_not_read_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text("nonsense: [")
    with pytest.raises(RegistryError, match="would not be read"):
        pins.replace(path, "nonsense: [ 1 ]")
    assert path.read_text() == "nonsense: ["


def test_steps_without_a_version_are_told(models: Path) -> None:
    path = models / "tiny" / "config.pbtxt"
    path.write_text(path.read_text().replace("model_version: 1\n", ""))
    with pytest.raises(RegistryError, match="no model_version each"):
        registry.promote(models, "tiny", 2)


def test_at_every_moment_the_parts_serve_what_an_ensemble_is_pinned_to(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare Triton may start at any; or whoever changes the files may be killed."""
    written: list[str] = []

    def replace(path: Path, text: str) -> None:
        really(path, text)
        written.append(path.parent.name)
        for ensemble in (models / "tiny", models / "tiny_candidate"):
            for part in ("tiny_tokenizer", "tiny_encoder") if ensemble.is_dir() else ():
                policy = set(config(models / part).version_policy.specific.versions)
                pinned = {step.model_version for step in config(ensemble).ensemble_scheduling.step}
                assert pinned <= policy, (ensemble.name, written)

    really = pins.replace
    monkeypatch.setattr(pins, "replace", replace)
    registry.promote(models, "tiny", 2)
    registry.propose(models, "tiny", 3)
    registry.propose(models, "tiny", 1)
    assert served(models) == ([2], {2}, [1, 2])
    registry.rollback(models, "tiny")
    registry.propose(models, "tiny", 3)
    registry.promote(models, "tiny", 3)
    assert served(models) == ([3], {3}, [3])
    registry.propose(models, "tiny", 2)
    registry.withdraw(models, "tiny")
    assert served(models) == ([3], {3}, [3])
    assert len(written) > 20


def test_nobody_else_changes_the_model_meanwhile(models: Path) -> None:
    with repository.locked(models, "tiny"):
        for change in (registry.promote, registry.propose, registry.remove):
            with pytest.raises(Busy):
                change(models, "tiny")


def test_a_repository_from_before_there_were_pins(models: Path) -> None:
    for part in ("tiny", "tiny_tokenizer", "tiny_encoder"):
        path = models / part / "config.pbtxt"
        text = path.read_text()
        for start, end in pins.fields(text, "version_policy"):
            text = text[:start] + text[end:]
        path.write_text(pins.with_pin(text, -1) if part == "tiny" else text)
    assert pins.live(models, "tiny") == 3
    assert registry.promote(models, "tiny", 1) == (1, 3)
    assert served(models) == ([1], {1}, [1])
    assert registry.rollback(models, "tiny") == (3, 1)


def test_a_name_that_would_be_a_candidates_is_refused(tiny: Path, tmp_path: Path) -> None:
    from arrowhead_conversion.errors import InvalidName

    with pytest.raises(InvalidName, match="not ending in _tokenizer, _encoder, _candidate"):
        convert(str(tiny), "tiny_candidate", tmp_path, progress=False)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_commands(models: Path) -> None:
    where = ("--repository", models)
    nobody = ("--url", "http://127.0.0.1:9")
    status, said = run("models", *where, *nobody)
    assert status == 0
    header, *rows = said.splitlines()
    assert header.split()[:4] == ["name", "version", "role", "dtype"]
    assert [row.split()[:4] for row in rows] == [
        ["tiny", "1", "live", "float16"],
        ["tiny", "2", "idle", "float16"],
        ["tiny", "3", "idle", "float16"],
    ]
    assert all(row.endswith("unreachable") for row in rows)
    status, said = run("models", *where, *nobody, "--json")
    assert [row["dimension"] for row in json.loads(said)] == [24, 24, 24]
    status, said = run("promote", "tiny", 2, *where)
    assert (status, said.split(";")[0]) == (0, "tiny version 2 is live, in place of 1")
    status, said = run("promote", "tiny", "--candidate", *where)
    assert (status, said.split(",")[0]) == (0, "tiny version 3 is the candidate")
    status, said = run("rollback", "tiny", "--candidate", *where)
    assert (status, said.split(";")[0]) == (0, "tiny version 3 is no candidate any more")
    status, said = run("rollback", "tiny", *where)
    assert (status, said.split(";")[0]) == (0, "tiny version 1 is live, in place of 2")
    status, said = run("remove", "tiny", 3, *where)
    assert (status, roles(models).keys()) == (130, {1, 2, 3})  # nobody said yes
    status, said = run("remove", "tiny", 3, "--yes", *where)
    assert (status, said) == (0, "tiny version 3 is removed\n")
    status, said = run("promote", "tiny", 9, *where)
    assert (status, said) == (1, "arrowhead: tiny has no version 9; versions there: 1, 2\n")
