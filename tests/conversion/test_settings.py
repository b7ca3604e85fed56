# SPDX-License-Identifier: Apache-2.0
"""`arrowhead configure` changes what it names in the configurations, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from arrowhead_client.cli import main
from arrowhead_conversion import pins, settings
from arrowhead_conversion.errors import RegistryError
from arrowhead_conversion.repository import template


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model `tiny` whose version 3 is live; only its names and configurations are real."""
    for part in ("", "_tokenizer", "_encoder"):
        folder = tmp_path / f"tiny{part}"
        (folder / "3").mkdir(parents=True)
        text = (template() / f"minilm{part}" / "config.pbtxt").read_text()
        text = text.replace('"minilm', '"tiny')
        if not part:
            text = pins.with_pin(text, 3)
        (folder / "config.pbtxt").write_text(text)
    (tmp_path / "tiny_encoder" / "3" / "weights.parquet").touch()
    return tmp_path


def config(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def test_the_compute_dtype(models: Path) -> None:
    before = config(models / "tiny_encoder")
    comments = (models / "tiny_encoder" / "config.pbtxt").read_text().count("#")
    for dtype in settings.COMPUTE_DTYPES:
        settings.set_compute_dtype(models, "tiny", dtype)
        after = config(models / "tiny_encoder")
        assert after.parameters["compute_dtype"].string_value == dtype
        after.parameters["compute_dtype"].string_value = "auto"
        assert after == before
    assert (models / "tiny_encoder" / "config.pbtxt").read_text().count("#") == comments


def test_the_number_of_encoding_processes(models: Path) -> None:
    path = models / "tiny_encoder" / "config.pbtxt"
    before = path.read_text()
    path.write_text("# instance_group [ { count: 9 } ]\n" + before)
    settings.set_instances(models, "tiny", 3)
    assert [g.count for g in config(path.parent).instance_group] == [3]
    assert path.read_text().startswith("# instance_group [ { count: 9 } ]\n")
    settings.set_instances(models, "tiny", 1)
    assert path.read_text().endswith(before)


OTHER = 'parameters { key: "other" value { string_value: "x" } }'
OURS = 'parameters { key: "compute_dtype" value { string_value: "auto" } }'


@pytest.mark.parametrize(
    "written",
    [
        f'# "compute_dtype" is below\n{OTHER}\n{OURS}',
        f"# {OURS}\n{OTHER}\n{OURS}",
        f'parameters {{ value {{ string_value: "auto" }} key: "compute_dtype" }}\n{OTHER}',
        f"{OTHER}\nparameters {{ key: 'compute_dtype' value {{ string_value: 'auto' }} }}",
        f'{OTHER}\nparameters <key:"compute_dtype" # string_value: "x"\n'
        'value: <string_value:"auto">>',
        'parameters [ { key: "other" value { string_value: "x" } },'
        ' { key: "compute_dtype" value { string_value: "auto" } } ]',
    ],
)
def test_the_compute_dtype_however_it_is_written(models: Path, written: str) -> None:
    path = models / "tiny_encoder" / "config.pbtxt"
    path.write_text(path.read_text().replace(OURS, written))
    settings.set_compute_dtype(models, "tiny", "int8")
    met = {key: value.string_value for key, value in config(path.parent).parameters.items()}
    assert met == {"compute_dtype": "int8", "other": "x"}


def test_a_warm_up_of_the_users_own_stays(models: Path) -> None:
    path = models / "tiny_encoder" / "config.pbtxt"
    path.write_text(path.read_text() + settings.WARMUP.replace("one text", "mine"))
    before = path.read_text()
    for _ in range(2):
        settings.set_steps(models, "tiny", "fused")
        met = [warmup.name for warmup in config(path.parent).model_warmup]
        assert met == ["one short text", "mine", "one text"]
    settings.set_steps(models, "tiny", "two-step")
    assert path.read_text() == before


def test_one_step_and_back(models: Path) -> None:
    before = [(models / name / "config.pbtxt").read_text() for name in ("tiny", "tiny_encoder")]
    settings.set_steps(models, "tiny", "fused")
    assert len(config(models / "tiny_encoder").model_warmup) == 2
    (step,) = config(models / "tiny").ensemble_scheduling.step
    assert (step.model_name, step.model_version) == ("tiny_encoder", 3)
    assert dict(step.input_map) == {"text": "text"}
    assert pins.live(models, "tiny") == 3
    settings.set_steps(models, "tiny", "fused")  # again is no harm
    text = (models / "tiny" / "config.pbtxt").read_text()
    assert pins.pins(pins.with_pin(text, 4)) == {4}
    assert len(config(models / "tiny_encoder").model_warmup) == 2
    settings.set_steps(models, "tiny", "two-step")
    after = [(models / name / "config.pbtxt").read_text() for name in ("tiny", "tiny_encoder")]
    assert after == before


def test_an_encoder_that_takes_no_text_cannot_be_fused(models: Path) -> None:
    path = models / "tiny_encoder" / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "text"', 'name: "other"'))
    with pytest.raises(RegistryError, match="declares no input text"):
        settings.set_steps(models, "tiny", "fused")


@pytest.mark.parametrize(
    ("part", "missing", "change", "message"),
    [
        ("_encoder", "compute_dtype", "--compute-dtype=int8", "has no parameter compute_dtype"),
        ("_encoder", "instance_group", "--instances=2", "has no instance_group with a count"),
        ("", "ensemble_scheduling", "--fused", "has no ensemble_scheduling"),
    ],
)
def test_a_configuration_without_what_is_to_be_set(
    models: Path, part: str, missing: str, change: str, message: str
) -> None:
    path = models / f"tiny{part}" / "config.pbtxt"
    path.write_text(path.read_text().replace(missing, "something_else"))
    result = CliRunner().invoke(main, ["configure", "tiny", change, f"--repository={models}"])
    assert result.exit_code != 0
    assert message in result.output


def test_the_command(models: Path) -> None:
    run = CliRunner().invoke
    options = ["--compute-dtype=int8", "--fused", "--instances=2", f"--repository={models}"]
    result = run(main, ["configure", "tiny", *options])
    assert result.exit_code == 0, result.output
    assert "tiny computes in int8" in result.output
    assert "tiny is served in one step" in result.output
    assert "tiny has 2 encoding processes" in result.output
    assert "start `arrowhead serve` again" in result.output
    result = run(main, ["configure", "tiny", "--repository", str(models)])
    assert "name what to set" in result.output
    shutil.rmtree(models / "tiny_encoder")
    result = run(main, ["configure", "tiny", *options])
    assert "holds no model 'tiny'" in result.output
