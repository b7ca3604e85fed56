# SPDX-License-Identifier: Apache-2.0
"""Each network, small and random, gives what transformers' own gives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from arrowhead_engine.architectures import WITH_A_FILE, architecture
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import UnsupportedModel

from .random_models import BERT, VOCAB, configs, model_file

# Lengths in every mix: alone, equal, all different, beyond one window, beyond one group.
MIXES = [[1], [3], [130], [7, 7, 7], [2, 150, 3, 64, 65, 9], list(range(1, 40))]


DECODER = {**BERT, "num_key_value_heads": 2, "head_dim": 12}


def general_configs() -> dict[str, Any]:
    """Networks that go through transformers' own modules."""
    return {
        "qwen3": transformers.Qwen3Config(**DECODER),
        "gemma3_text": transformers.Gemma3TextConfig(
            **DECODER, use_bidirectional_attention=True, sliding_window=32
        ),
        "mistral": transformers.MistralConfig(**DECODER, sliding_window=None),
        "eurobert": transformers.EuroBertConfig(
            **DECODER, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3
        ),
        "gte": transformers.GteConfig(**BERT),
        "electra": transformers.ElectraConfig(**BERT, embedding_size=24),
        "albert": transformers.AlbertConfig(**BERT, embedding_size=24),
        "deberta-v2": transformers.DebertaV2Config(**BERT),
        "t5": transformers.T5Config(
            vocab_size=VOCAB, d_model=48, d_kv=12, d_ff=80, num_layers=3, num_heads=4
        ),
    }


@pytest.fixture(scope="module", params=[*WITH_A_FILE, *general_configs()])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' model, and a weight file made from it."""
    config = {**configs(), **general_configs()}[request.param]
    return model_file(request.param, config, tmp_path_factory.mktemp("architectures"))


def reference(model: Any, rows: list[np.ndarray]) -> np.ndarray:
    """Mean of the token vectors of each text alone, at length 1."""
    out = []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        with torch.no_grad():
            tokens = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        out.append(torch.nn.functional.normalize(tokens.mean(0), dim=0).numpy())
    return np.stack(out)


@pytest.mark.parametrize("lengths", MIXES, ids=lambda mix: f"{len(mix)}x{max(mix)}")
def test_equals_transformers(pair: Any, lengths: list[int]) -> None:
    model, path = pair
    rng = np.random.default_rng(len(lengths))
    rows = [rng.integers(5, VOCAB, n).astype(np.int32) for n in lengths]
    met = Encoder.open(path, device="cpu", dtype="float32", engine="torch").embed(rows)
    assert np.abs(met - reference(model, rows)).max() <= 1e-5


def test_bfloat16_is_close(pair: Any) -> None:
    model, path = pair
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, VOCAB, n).astype(np.int32) for n in (1, 5, 40, 150)]
    met = Encoder.open(path, device="cpu", dtype="bfloat16", engine="torch").embed(rows)
    assert (met * reference(model, rows)).sum(1).min() > 0.999


def test_a_config_of_its_own_making_is_read_back() -> None:
    for name, config in configs().items():
        kind = architecture(name)
        sizes = kind.config(json.loads(config.to_json_string()))
        assert kind.config(sizes.to_dict()) == sizes


def test_modernberts_older_spelling_means_the_same() -> None:
    newer = json.loads(configs()["modernbert"].to_json_string())
    older = {key: newer[key] for key in newer if key not in ("layer_types", "rope_parameters")}
    older |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000, "local_rope_theta": 1e4}
    kind = architecture("modernbert")
    assert kind.config(older) == kind.config(newer)


def test_nomicberts_older_spelling_means_the_same() -> None:
    kind = architecture("nomic_bert")
    older = {
        "n_embd": 48,
        "n_layer": 4,
        "n_head": 4,
        "n_inner": 80,
        "n_positions": 8192,
        "max_trained_positions": 160,
        "vocab_size": VOCAB,
        "layer_norm_epsilon": 1e-12,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "activation_function": "swiglu",
        "prenorm": False,
        "qkv_proj_bias": False,
    }
    newer = json.loads(configs()["nomic_bert"].to_json_string())
    assert kind.config(older) == kind.config(newer)
    for name, value in {"prenorm": True, "moe_every_n_layers": 2}.items():
        with pytest.raises(UnsupportedModel, match=f"{name} is {value}"):
            kind.config({**older, name: value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act is 'relu'; known is 'gelu'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"num_attention_heads": 5}, "a width of 48 is not a multiple of 5 heads"),
        ("distilbert", {"activation": "relu"}, "activation is 'relu'"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("nomic_bert", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ],
)
def test_what_would_come_out_wrong_is_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    raw = {**json.loads(configs()[name].to_json_string()), **change}
    with pytest.raises(UnsupportedModel, match=message):
        architecture(name).config(raw)


def test_an_architecture_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"architecture 'new': transformers .* no such net"):
        architecture("new").config({"model_type": "new"})
    own_code = {"model_type": "new", "auto_map": {"AutoModel": "modeling.NewModel"}}
    with pytest.raises(UnsupportedModel, match="it needs code of its own, which is never run"):
        architecture("new").config(own_code)
