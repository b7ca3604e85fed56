# SPDX-License-Identifier: Apache-2.0
"""A model's folder -> what it is: which network, which pooling, which heads, limits and prompts.

A sentence-transformers model says all of that itself (`modules.json`); of a plain network the user
may. Refuses whatever it does not know: a wrong guess here is a wrong vector later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arrowhead_conversion.errors import UnsupportedSource
from arrowhead_engine.architectures import Config, architecture
from arrowhead_engine.pooling import ACTIVATIONS, POOLINGS, Heads
from arrowhead_engine.spec import ModelSpec
from arrowhead_engine.tokenizer import Tokenizer

LEAST_TOKENS = 3  # a first, a last and one of the text
MOST_TOKENS = 512  # the served limit unless the user asks for more: attention costs its square

# `1_Pooling/config.json` before sentence-transformers 5.4: one boolean a mode, in the order in
# which the modes' vectors lie side by side.
LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Where a sentence-transformers Transformer keeps its limit; the later names are old ones.
LIMIT_FILES = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# Beginnings of texts by which it is learnt which ids a prompt becomes.
SAMPLES = ("a", "The quick brown fox", "42", "快速的", "\N{ROCKET} go", "...", "")


@dataclass(frozen=True)
class Choices:
    """What the user decides. Pooling and normalising only of a model that does not say itself.

    Attributes:
        pooling: a key of `pooling.POOLINGS`; None is mean.
        normalize: whether vectors are scaled to length 1; None is no.
        max_seq_length: the longest text in tokens; None is the model's own limit, up to 512.
    """

    pooling: str | None = None
    normalize: bool | None = None
    max_seq_length: int | None = None


@dataclass(frozen=True)
class Described:
    """A model's folder, understood.

    Attributes:
        spec: what it is.
        folder: the whole model. network: where its network and tokenizer are.
        heads: where its dense heads are.
        vocab_size: token ids are below it.
        says_itself: whether it has a `modules.json`.
        notes: what the user should know, a line each.
    """

    spec: ModelSpec
    folder: Path
    network: Path
    heads: tuple[Path, ...]
    vocab_size: int
    says_itself: bool
    notes: tuple[str, ...]


def describe(
    folder: Path, source: str, revision: str | None = None, choices: Choices | None = None
) -> Described:
    """What the model in `folder` is.

    Args:
        folder: a sentence-transformers model, or a plain network.
        source: what the user named; kept in the spec.
        revision: likewise, of a hub model.
        choices: what the user decides.

    Raises:
        UnsupportedSource: names the part that is not known, and what is.
        UnsupportedModel: the network's sizes ask for something the engine does not compute.
    """
    choices = choices or Choices()
    says_itself = (folder / "modules.json").is_file()
    parts = _modules(folder, source) if says_itself else []
    network_folder = folder / parts[0][1] if says_itself else folder
    config = _json(network_folder / "config.json")
    model_type = str(config.get("model_type"))
    network: Config = architecture(model_type).config(config)
    notes: list[str] = []
    if says_itself:
        if choices.pooling is not None or choices.normalize is not None:
            raise UnsupportedSource(
                f"{source}: says in its modules.json how it pools and normalises; leave those "
                "options out"
            )
        pooled = _json(folder / parts[1][1] / "config.json")
        pooling = _pooling(pooled, source)
        include_prompt = pooled.get("include_prompt", True)
        normalize = parts[-1][0] == "Normalize"
        heads = tuple(folder / path for kind, path in parts if kind == "Dense")
    else:
        pooling, normalize = choices.pooling or "mean", bool(choices.normalize)
        include_prompt, heads = True, ()
        notes.append(
            f"no modules.json: {pooling} pooling, {'' if normalize else 'not '}normalised, as "
            "--pooling and --normalize say"
        )
    dense = [_dense(path, source) for path in heads]
    described = _json(folder / "config_sentence_transformers.json", optional=True)
    if described.get("truncate_dim") is not None:
        raise UnsupportedSource(
            f"{source}: cuts its vectors to {described['truncate_dim']} dimensions by default, "
            "which is not known; remove truncate_dim and ask the client for dimensions instead"
        )
    prompts, default_prompt = _prompts(described, source)
    if default_prompt and "" in prompts.values():
        unprompted = ", ".join(name for name, prompt in prompts.items() if not prompt)
        notes.append(
            f"every text gets the default prompt {default_prompt!r}, so that the empty prompt of "
            f"{unprompted} cannot be asked for"
        )
    if not include_prompt and not any(prompts.values()):
        notes.append(
            "its pooling leaves prompts out, but it names none: a prompt in front of a text "
            "counts as text"
        )
    spec = ModelSpec(
        architecture=model_type,
        config={**network.to_dict(), "pad_token_id": config.get("pad_token_id") or 0},
        pooling=pooling,
        normalize=normalize,
        max_seq_length=_limit(network_folder, source, network, choices),
        dimension=Heads.after(pooling, dense, network.width).width,
        prompts=prompts,
        source={
            "name": source,
            **({"revision": revision} if revision else {}),
            "arrowhead": version("arrowhead"),
        },
        heads=dense,
        default_prompt=default_prompt,
        # Filled in by `exclude_prompts`, which needs the tokenizer.
        excluded_prompts=[] if include_prompt else [{"ids": [0], "tokens": 1}],
    )
    return Described(
        spec, folder, network_folder, heads, network.vocab_size, says_itself, tuple(notes)
    )


def exclude_prompts(spec: ModelSpec, tokenizer: bytes) -> ModelSpec:
    """The spec with the ids by which each prompt is known, if its pooling leaves prompts out.

    Raises:
        UnsupportedSource: a prompt whose tokens cannot be told from those of a text.
    """
    if not spec.excluded_prompts:
        return spec
    bare = replace(spec, default_prompt="", excluded_prompts=[])
    encode = Tokenizer.parse(tokenizer, bare).encode
    nothing = encode([""])[0][0]
    known: list[dict[str, Any]] = []
    for name, prompt in spec.prompts.items():
        if not prompt:
            continue
        rows, _ = encode([prompt, *(prompt + sample for sample in SAMPLES)])
        alone = rows[0]
        # sentence-transformers counts the prompt's tokens when it stands alone, but for the end
        # that the tokenizer puts behind every text.
        tokens = len(alone) - (bool(nothing) and alone[-1] == nothing[-1] and len(alone) > 1)
        ids = alone[:tokens]
        for row in rows[1:]:
            while row[: len(ids)] != ids:
                ids = ids[:-1]
        if len(ids) < max(tokens - 1, 2):
            raise UnsupportedSource(
                f"its pooling leaves the prompt {name!r} out, whose tokens cannot be told from "
                "those of the text behind it"
            )
        known.append({"ids": ids, "tokens": tokens})
    # The longest first: one prompt may begin with another.
    known.sort(key=lambda prompt: -len(prompt["ids"]))
    return replace(spec, excluded_prompts=known)


def _modules(folder: Path, source: str) -> list[tuple[str, str]]:
    """Kind and folder of the pipeline's modules."""
    path = folder / "modules.json"
    try:
        modules = [(module["type"].split("."), str(module["path"])) for module in _load(path)]
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedSource(f"{path}: not a list of modules with type and path") from error
    if outside := [at for _, at in modules if Path(at).is_absolute() or ".." in Path(at).parts]:
        raise UnsupportedSource(f"{path}: the module folder {outside[0]!r} is outside the model")
    # A module of somebody's own keeps its whole name, so that it is not taken for a known one.
    kinds = [
        kind[-1] if kind[0] == "sentence_transformers" else ".".join(kind) for kind, _ in modules
    ]
    middle = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(middle) - {"Dense"}:
        raise UnsupportedSource(
            f"{source}: pipeline {' -> '.join(kinds)}; known is Transformer -> Pooling "
            "[-> Dense ...] [-> Normalize]"
        )
    return list(zip(kinds, (at for _, at in modules), strict=True))


def _pooling(config: dict[str, Any], source: str) -> str:
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in LEGACY_POOLING.items() if config.get(key)] or "mean"
    modes = [str(one) for one in (mode if isinstance(mode, list) else [mode])]
    if not modes or set(modes) - set(POOLINGS):
        raise UnsupportedSource(
            f"{source}: pooling {' + '.join(modes) or 'none'}; known are: {', '.join(POOLINGS)}"
        )
    return "+".join(modes)


def _dense(folder: Path, source: str) -> dict[str, Any]:
    config = _json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    if not f"{package}.".startswith("torch.nn.") or name not in ACTIVATIONS:
        raise UnsupportedSource(
            f"{source}: {folder.name} has the activation {activation}; known are those of "
            f"torch.nn called {', '.join(ACTIVATIONS)}"
        )
    usual = {"use_residual": False, "module_input_name": "sentence_embedding"}
    usual["module_output_name"] = usual["module_input_name"]
    for key, wanted in usual.items():
        if config.get(key) not in (None, wanted):
            raise UnsupportedSource(
                f"{source}: {folder.name} has {key} = {config[key]!r}; known is {wanted!r}"
            )
    return {
        "in_features": config.get("in_features"),
        "out_features": config.get("out_features"),
        "bias": bool(config.get("bias", True)),
        "activation": name,
    }


def _prompts(described: dict[str, Any], source: str) -> tuple[dict[str, str], str]:
    """The prompts by name, and the default one; sentence-transformers writes null for none."""
    raw = described.get("prompts") or {}
    if not isinstance(raw, dict) or any(type(v) not in (str, type(None)) for v in raw.values()):
        raise UnsupportedSource(f"{source}: prompts is {raw!r}; wanted an object of strings")
    prompts = {name: prompt or "" for name, prompt in raw.items()}
    name = described.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise UnsupportedSource(
            f"{source}: its default prompt {name!r} is not among its prompts: "
            f"{', '.join(prompts) or 'none'}"
        )
    return prompts, prompts.get(name, "") if name is not None else ""


def _limit(folder: Path, source: str, network: Config, choices: Choices) -> int:
    """As sentence-transformers does: its own limit, else the tokenizer's, which may be absurd."""
    own = next((_json(folder / name) for name in LIMIT_FILES if (folder / name).is_file()), {})
    tokenizer = _json(folder / "tokenizer_config.json", optional=True)
    limit = own.get("max_seq_length") or tokenizer.get("model_max_length") or MOST_TOKENS
    if type(limit) is not int or limit < LEAST_TOKENS:
        raise UnsupportedSource(
            f"{source}: max_seq_length is {limit!r}; wanted a whole number from {LEAST_TOKENS} up"
        )
    if tokenizer.get("truncation_side", "right") != "right":
        raise UnsupportedSource(f"{source}: cuts long texts at their beginning, which is not known")
    most = min(limit, network.most_tokens)
    asked = choices.max_seq_length
    if asked is not None and not LEAST_TOKENS <= asked <= most:
        raise UnsupportedSource(
            f"{source}: max_seq_length {asked} was asked for; it takes {LEAST_TOKENS} to {most}"
        )
    return asked or min(most, MOST_TOKENS)


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
