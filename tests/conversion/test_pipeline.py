# SPDX-License-Identifier: Apache-2.0
"""The model's own pipeline, exactly: what `SentenceTransformer.encode` gives, the entry gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from arrowhead_conversion.convert import convert
from arrowhead_conversion.errors import UnsupportedSource
from arrowhead_conversion.pipeline import Choices
from arrowhead_engine.encoder import cosine
from arrowhead_engine.pooling import POOLINGS

from .conftest import TEXTS, TINY, assert_close, edit, modules, served, source


def pooling(folder: Path, **config: Any) -> None:
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"embedding_dimension": TINY["hidden_size"], **config}))


def legacy_pooling(folder: Path, *modes: str) -> None:
    path = folder / "1_Pooling" / "config.json"
    flags = {f"pooling_mode_{mode}": True for mode in modes}
    path.write_text(json.dumps({"word_embedding_dimension": TINY["hidden_size"], **flags}))


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as long as they are"])
def test_each_pooling(tiny: Path, tmp_path: Path, mode: str, normalize: bool) -> None:
    pooling(tiny, pooling_mode=mode)
    modules(tiny, "Transformer", "Pooling", *["Normalize"] * normalize)
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    met = served(made, TEXTS)
    assert_close(met, source(tiny, TEXTS))
    assert bool((np.abs(np.linalg.norm(met, axis=1) - 1) < 1e-3).all()) is normalize


@pytest.mark.parametrize(
    ("describe", "wanted"),
    [
        (lambda m: pooling(m, pooling_mode=["mean", "cls", "max"]), "mean+cls+max"),
        (lambda m: legacy_pooling(m, "mean_tokens", "cls_token", "max_tokens"), "cls+max+mean"),
        (lambda m: legacy_pooling(m), "mean"),
    ],
    ids=["newer", "older", "none named"],
)
def test_poolings_side_by_side(
    tiny: Path, tmp_path: Path, describe: Callable[[Path], None], wanted: str
) -> None:
    describe(tiny)
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.pooling == wanted
    assert made.spec.dimension == TINY["hidden_size"] * len(wanted.split("+"))
    assert_close(served(made, TEXTS), source(tiny, TEXTS))


def dense(folder: Path, wide: int, out: int, *, bias: bool, activation: str, pickled: bool) -> None:
    folder.mkdir()
    config = {
        "in_features": wide,
        "out_features": out,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{activation}",
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(out)
    tensors = {"linear.weight": torch.randn(out, wide)}
    if bias:
        tensors["linear.bias"] = torch.randn(out)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(tensors, folder / "model.safetensors")


def test_dense_heads(tiny: Path, tmp_path: Path) -> None:
    modules(tiny, "Transformer", "Pooling", "Dense", "Dense", "Normalize")
    width = TINY["hidden_size"]
    tanh, identity = "activation.Tanh", "linear.Identity"
    dense(tiny / "2_Dense", width, 40, bias=True, activation=tanh, pickled=False)
    dense(tiny / "3_Dense", 40, 16, bias=False, activation=identity, pickled=True)
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.dimension == 16
    assert_close(served(made, TEXTS), source(tiny, TEXTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "evil.Tanh"}, r"has the activation evil\.Tanh"),
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "Softmax; known are"),
        ({"use_residual": True}, "use_residual = True"),
        ({"module_input_name": "token_embeddings"}, "module_input_name = 'token_embeddings'"),
    ],
)
def test_heads_of_another_kind_are_refused(
    tiny: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    modules(tiny, "Transformer", "Pooling", "Dense")
    dense(tiny / "2_Dense", 24, 8, bias=True, activation="activation.Tanh", pickled=False)
    edit(tiny / "2_Dense" / "config.json", **change)
    with pytest.raises(UnsupportedSource, match=message):
        convert(str(tiny), "tiny", tmp_path / "repository", progress=False)


PROMPTS = {"query": "represent this query: ", "document": "", "other": "query: "}


def test_prompts_are_kept_and_certified(tiny: Path, tmp_path: Path) -> None:
    edit(tiny / "config_sentence_transformers.json", prompts={**PROMPTS, "none": None})
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert made.spec.prompts == {**PROMPTS, "none": ""}
    assert made.certificate.texts == 24 + 2 * 3
    with_prompt = source(tiny, TEXTS, prompt_name="query")
    assert_close(served(made, [PROMPTS["query"] + text for text in TEXTS]), with_prompt)
    assert_close(served(made, TEXTS), source(tiny, TEXTS))


def test_a_default_prompt_is_put_before_what_has_none(tiny: Path, tmp_path: Path) -> None:
    edit(tiny / "config_sentence_transformers.json", prompts=PROMPTS, default_prompt_name="query")
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert any("default prompt 'represent this query: '" in note for note in made.notes)
    by_default = served(made, TEXTS)
    assert_close(by_default, source(tiny, TEXTS))
    other = served(made, [PROMPTS["other"] + text for text in TEXTS])
    assert_close(other, source(tiny, TEXTS, prompt_name="other"))
    assert cosine(other[0], by_default[0]) < 0.9999


@pytest.mark.parametrize("mode", POOLINGS)
def test_a_prompt_that_does_not_count(tiny: Path, tmp_path: Path, mode: str) -> None:
    pooling(tiny, pooling_mode=mode, include_prompt=False)
    edit(tiny / "config_sentence_transformers.json", prompts=PROMPTS)
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert [prompt["tokens"] for prompt in made.spec.excluded_prompts] == [5, 3]
    texts = [PROMPTS["query"] + text for text in TEXTS] + TEXTS
    wanted = np.concatenate([source(tiny, TEXTS, prompt_name="query"), source(tiny, TEXTS)])
    assert_close(served(made, texts), wanted)


def test_a_prompt_that_cannot_be_told_from_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    pooling(tiny, pooling_mode="mean", include_prompt=False)
    # In WordPiece the next word grows onto it: "rep" + "a" is one token.
    edit(tiny / "config_sentence_transformers.json", prompts={"query": "rep"})
    with pytest.raises(UnsupportedSource, match="cannot be told from those of the text"):
        convert(str(tiny), "tiny", tmp_path / "repository", progress=False)


def plain(tiny: Path) -> Path:
    """A network and its tokenizer, and nothing of sentence-transformers."""
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (tiny / name).unlink()
    shutil.rmtree(tiny / "1_Pooling")
    edit(tiny / "tokenizer_config.json", model_max_length=48)
    return tiny


def test_a_plain_network_is_pooled_as_stated(tiny: Path, tmp_path: Path) -> None:
    folder = plain(tiny)
    made = convert(str(folder), "tiny", tmp_path / "repository", progress=False)
    assert made.notes[0].startswith("no modules.json: mean pooling, not normalised")
    assert_close(served(made, TEXTS), source(folder, TEXTS))


def test_a_plain_network_is_pooled_as_asked(tiny: Path, tmp_path: Path) -> None:
    folder = plain(tiny)
    choices = Choices(pooling="cls", normalize=True, max_seq_length=20)
    made = convert(str(folder), "t", tmp_path / "repository", choices=choices, progress=False)
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [
            model(**tokenizer(t, return_tensors="pt", truncation=True, max_length=20))[0][0, 0]
            for t in TEXTS
        ]
    wanted = torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()
    assert_close(served(made, TEXTS), wanted)


def test_what_a_model_says_itself_is_not_asked_for(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSource, match=r"says in its modules\.json how it pools"):
        convert(str(tiny), "t", tmp_path, choices=Choices(pooling="cls"), progress=False)


def test_a_longer_limit_than_the_models_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSource, match="49 was asked for; it takes 3 to 48"):
        convert(str(tiny), "t", tmp_path, choices=Choices(max_seq_length=49), progress=False)


def test_the_transformer_may_lie_in_a_folder_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """As models of sentence-transformers' first years do."""
    inner = tiny / "0_Transformer"
    inner.mkdir()
    for path in list(tiny.iterdir()):
        if path.is_file() and path.name not in (
            "modules.json",
            "config_sentence_transformers.json",
        ):
            path.rename(inner / path.name)
    rows = json.loads((tiny / "modules.json").read_text())
    rows[0]["path"] = "0_Transformer"
    (tiny / "modules.json").write_text(json.dumps(rows))
    made = convert(str(tiny), "tiny", tmp_path / "repository", progress=False)
    assert_close(served(made, TEXTS), source(tiny, TEXTS))
