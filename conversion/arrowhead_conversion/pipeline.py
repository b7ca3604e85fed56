# SPDX-License-Identifier: Apache-2.0
"""A sentence-transformers folder -> `ModelSpec`: which network, which pooling, which limits.

Refuses whatever it does not know: a wrong guess here is a wrong vector later.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arrowhead_conversion.errors import UnsupportedSource
from arrowhead_engine.architectures import ARCHITECTURES
from arrowhead_engine.pooling import POOLINGS
from arrowhead_engine.spec import ModelSpec

LEAST_TOKENS = 3  # a first, a last and one of the text
MOST_TOKENS = 512  # the served limit, whatever longer texts a model could take

# `1_Pooling/config.json` before sentence-transformers 5.4: one boolean a mode.
LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_spec(folder: Path, source: str, revision: str | None) -> ModelSpec:
    """The spec of the model in `folder`.

    Args:
        folder: a sentence-transformers model.
        source: what the user named; kept in the spec.
        revision: likewise, of a hub model.

    Raises:
        UnsupportedSource: names the part that is not known, and what is.
        UnsupportedModel: the network's sizes ask for something the engine does not compute.
    """
    config = _json(folder / "config.json")
    architecture = str(config.get("model_type"))
    if architecture not in ARCHITECTURES:
        raise UnsupportedSource(
            f"{source}: architecture {architecture!r}; known are: {', '.join(ARCHITECTURES)}"
        )
    network = ARCHITECTURES[architecture].config(config)
    parts = _modules(folder, source)
    transformer, pooling = parts[0], parts[1]
    own = _json(folder / transformer / "sentence_bert_config.json", optional=True)
    tokenizer = _json(folder / transformer / "tokenizer_config.json", optional=True)
    described = _json(folder / "config_sentence_transformers.json", optional=True)
    if described.get("truncate_dim") is not None:
        raise UnsupportedSource(
            f"{source}: cuts its vectors to {described['truncate_dim']} dimensions by default, "
            "which is not known; remove truncate_dim and ask the client for dimensions instead"
        )
    if described.get("default_prompt_name") is not None:
        raise UnsupportedSource(
            f"{source}: puts the prompt {described['default_prompt_name']!r} before every text by "
            "default, which is not known yet"
        )
    # As sentence-transformers does: its own limit, else the tokenizer's, which may be absurd.
    own_limit = own.get("max_seq_length") or tokenizer.get("model_max_length") or MOST_TOKENS
    if type(own_limit) is not int or own_limit < LEAST_TOKENS:
        raise UnsupportedSource(
            f"{source}: max_seq_length is {own_limit!r}; wanted a whole number from "
            f"{LEAST_TOKENS} up"
        )
    if tokenizer.get("truncation_side", "right") != "right":
        raise UnsupportedSource(f"{source}: cuts long texts at their beginning, which is not known")
    limits = (own_limit, network.most_tokens, MOST_TOKENS)
    return ModelSpec(
        architecture=architecture,
        config={**network.to_dict(), "pad_token_id": config.get("pad_token_id") or 0},
        pooling=_pooling(_json(folder / pooling / "config.json"), source),
        normalize=len(parts) == 3,
        max_seq_length=min(limits),
        dimension=network.width,
        prompts=described.get("prompts") or {},
        source={
            "name": source,
            **({"revision": revision} if revision else {}),
            "arrowhead": version("arrowhead"),
        },
    )


def _modules(folder: Path, source: str) -> list[str]:
    """The folders of the pipeline's modules: Transformer, Pooling and, maybe, Normalize."""
    path = folder / "modules.json"
    if not path.is_file():
        raise UnsupportedSource(
            f"{source}: has no modules.json, so nothing says how its tokens become one vector; "
            "name a sentence-transformers model"
        )
    try:
        modules = [(module["type"].split("."), module["path"]) for module in _load(path)]
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedSource(f"{path}: not a list of modules with type and path") from error
    # A module of somebody's own keeps its whole name, so that it is not taken for a known one.
    kinds = [
        kind[-1] if kind[0] == "sentence_transformers" else ".".join(kind) for kind, _ in modules
    ]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedSource(
            f"{source}: pipeline {' -> '.join(kinds)}; "
            "known is Transformer -> Pooling [-> Normalize]"
        )
    return [str(path) for _, path in modules]


def _pooling(config: dict[str, Any], source: str) -> Any:
    mode = config.get("pooling_mode") or []
    modes = [str(one) for one in (mode if isinstance(mode, list) else [mode])]
    modes += [name for key, name in LEGACY_POOLING.items() if config.get(key)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UnsupportedSource(
            f"{source}: pooling {' + '.join(modes) or 'none'}; known are: {', '.join(POOLINGS)}"
        )
    return modes[0]


def _json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    value = _load(path)
    if not isinstance(value, dict):
        raise UnsupportedSource(f"{path}: not a JSON object")
    return value


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UnsupportedSource(f"{path}: missing; is the download complete?") from None
    except ValueError as error:
        raise UnsupportedSource(f"{path}: not JSON: {error}") from error
