# SPDX-License-Identifier: Apache-2.0
"""What a model is, beside its weights: `ModelSpec`, and the `Certificate` of its vectors.

Both travel as JSON in the weight file's metadata and, for people, in `metadata.json` beside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from arrowhead_engine.errors import UnsupportedModel

MODEL_KEY = "arrowhead.model"
CERTIFICATE_KEY = "arrowhead.certificate"

Ids = npt.NDArray[np.int32]  # of one text, without padding
T = TypeVar("T")


@dataclass(frozen=True)
class ModelSpec:
    """Everything the engine must know to turn text into the model's own vectors.

    Attributes:
        architecture: which network, e.g. "bert" (HuggingFace's `model_type`).
        config: the network's sizes, under the names of HuggingFace's `config.json`.
        pooling: how token vectors become one vector: a key of `pooling.POOLINGS`, or several joined
            by "+", whose vectors lie side by side.
        heads: dense layers that follow, each the arguments of a `pooling.Dense`.
        normalize: whether the model's own pipeline ends by scaling to length 1.
        max_seq_length: longest text in tokens, special tokens included; the rest is cut off.
        dimension: D, width of an embedding.
        prompts: prefixes the model was trained with, by name ("query", "passage").
        default_prompt: the prefix of every text that begins with none of them.
        excluded_prompts: prompts whose tokens do not count in pooling (sentence-transformers'
            `include_prompt=False`): the ids by which a text is known to begin with one, and how
            many of its tokens that are.
        source: where the model came from: name, revision, and the libraries' versions.
    """

    architecture: str
    config: dict[str, Any]
    pooling: str
    normalize: bool
    max_seq_length: int
    dimension: int
    prompts: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    heads: list[dict[str, Any]] = field(default_factory=list)
    default_prompt: str = ""
    excluded_prompts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuses values that JSON may hold and the engine may not.

        Raises:
            UnsupportedModel: names the field, what was met and what was wanted.
        """
        for name in ("max_seq_length", "dimension"):
            positive_int(name, getattr(self, name))
        wanted = {
            "architecture": str,
            "config": dict,
            "pooling": str,
            "normalize": bool,
            "prompts": dict,
            "source": dict,
            "heads": list,
            "default_prompt": str,
            "excluded_prompts": list,
        }
        for name, kind in wanted.items():
            if not isinstance(getattr(self, name), kind):
                raise UnsupportedModel(
                    f"{name} is {getattr(self, name)!r}; wanted a {kind.__name__}"
                )
        if not all(isinstance(text, str) for text in self.prompts.values()):
            raise UnsupportedModel(f"prompts is {self.prompts!r}; wanted texts by name")
        for prompt in self.excluded_prompts:
            if not _is_excluded(prompt):
                raise UnsupportedModel(f"excluded_prompts holds {prompt!r}; wanted ids and tokens")

    def to_json(self) -> str:
        """The spec as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelSpec:
        """The spec in a weight file's metadata.

        Raises:
            UnsupportedModel: none there, or not one this version understands.
        """

        def build(raw: dict[str, Any]) -> ModelSpec:
            # What is not known may change the vectors, so it is not passed over.
            if later := raw.keys() - cls.__dataclass_fields__.keys():
                raise UnsupportedModel(
                    f"{MODEL_KEY} has {', '.join(sorted(later))}, which this Arrowhead does not "
                    "know; upgrade Arrowhead, or convert the model again with this one"
                )
            return cls(**raw)

        return _read(metadata, MODEL_KEY, build)


def _is_excluded(prompt: object) -> bool:
    """Whether this tells the ids by which a text begins with a prompt, and its tokens."""
    if not isinstance(prompt, dict):
        return False
    ids, tokens = prompt.get("ids"), prompt.get("tokens")
    return _are_ids(ids) and type(tokens) is int and 0 < len(ids) <= tokens + 1


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def model_sha256(metadata: Mapping[str, str]) -> str:
    """Of the spec as it was written: what a certificate is about, beside weights and tokenizer.

    Not of a `ModelSpec`, which a later Arrowhead may have given more fields.

    Raises:
        UnsupportedModel: there is none.
    """
    raw: dict[str, Any] = _read(metadata, MODEL_KEY, lambda raw: raw)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def positive_int(name: str, value: object) -> None:
    """Refuses what is not a size.

    Raises:
        UnsupportedModel: names it.
    """
    if type(value) is not int or value < 1:
        raise UnsupportedModel(f"{name} is {value!r}; wanted a positive whole number")


@dataclass(frozen=True)
class Probe:
    """Token ids without padding, and the embedding that was certified for them.

    It is this engine's own, in float32, from the weights as they are stored: near the source
    library's by the certificate's cosines, and to be met again much more closely than those when
    the weights were stored with a loss.
    """

    input_ids: tuple[int, ...]
    embedding: npt.NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the embedding as base64 of little-endian float32."""
        return {"input_ids": list(self.input_ids), "embedding": _base64(self.embedding)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Probe:
        """Inverse of `to_dict`; raises ValueError of ids that are none."""
        if not _are_ids(raw["input_ids"]):
            raise ValueError(f"input_ids is {raw['input_ids']!r:.80}; wanted a list of token ids")
        return cls(tuple(raw["input_ids"]), _array(raw["embedding"]))


@dataclass(frozen=True)
class Certificate:
    """Proof, made at conversion, that this engine reproduces the source library's float32 vectors.

    Attributes:
        worst_cosine: lowest cosine with the source library over the fixed texts, our engine in
            float32.
        mean_cosine: their mean.
        texts: how many texts were compared.
        weights_sha256: of all tensors' bytes, in file order.
        tokenizer_sha256: of `tokenizer.json`.
        model_sha256: of the spec, `model_sha256`.
        versions: the libraries and the Arrowhead that made the comparison.
        probes: a few texts' vectors, compared again whenever the model is loaded.
        bfloat16_cosine: lowest cosine over the probes between our engine in bfloat16 and in
            float32: what computing with fewer digits costs this model.
        ranges: float32 [2, D], the ends of each component's range, from the calibration texts:
            between them lie the steps of an embedding that is given out as int8. None in what an
            older Arrowhead converted.
    """

    worst_cosine: float
    mean_cosine: float
    texts: int
    weights_sha256: str
    tokenizer_sha256: str
    model_sha256: str
    versions: dict[str, str]
    probes: tuple[Probe, ...]
    bfloat16_cosine: float = 1.0
    ranges: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Refuses a certificate that proves nothing.

        Raises:
            UnsupportedModel: it holds no probes, or what it tells is of another kind.
        """
        for name, kind in (
            ("worst_cosine", (int, float)),
            ("mean_cosine", (int, float)),
            ("bfloat16_cosine", (int, float)),
            ("texts", int),
            ("weights_sha256", str),
            ("tokenizer_sha256", str),
            ("model_sha256", str),
            ("versions", dict),
        ):
            if not isinstance(getattr(self, name), kind):
                raise UnsupportedModel(f"{CERTIFICATE_KEY}: {name} is {getattr(self, name)!r:.80}")
        if not self.probes:
            raise UnsupportedModel(f"{CERTIFICATE_KEY} holds no probes; convert the model again")

    def to_json(self) -> str:
        """The certificate as one JSON object."""
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__}
        raw["probes"] = [probe.to_dict() for probe in self.probes]
        raw["ranges"] = None if self.ranges is None else _base64(self.ranges)
        return json.dumps(raw, sort_keys=True)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Certificate:
        """The certificate in a weight file's metadata.

        Raises:
            UnsupportedModel: none there, or not one this version understands.
        """

        def build(raw: dict[str, Any]) -> Certificate:
            ranges = raw.pop("ranges", None)
            probes = tuple(map(Probe.from_dict, raw.pop("probes")))
            # What a later Arrowhead proves beside is passed over: it changes no vector.
            known = {name: raw[name] for name in raw.keys() & cls.__dataclass_fields__.keys()}
            return cls(
                **known,
                probes=probes,
                ranges=None if ranges is None else _array(ranges).reshape(2, -1),
            )

        return _read(metadata, CERTIFICATE_KEY, build)


def info(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a served model tells of itself, JSON-ready (the client's `ModelInfo`).

    Raises:
        UnsupportedModel: the metadata is not one this version understands.
    """
    spec, proof = ModelSpec.from_metadata(metadata), Certificate.from_metadata(metadata)
    space = (proof.weights_sha256, proof.tokenizer_sha256, proof.model_sha256)
    told = json.loads(proof.to_json())
    del told["probes"]
    return {
        "dimension": spec.dimension,
        "max_seq_length": spec.max_seq_length,
        "pooling": spec.pooling,
        "normalize": spec.normalize,
        "source": spec.source,
        "fingerprint": hashlib.sha256("".join(space).encode()).hexdigest()[:32],
        "ranges": told.pop("ranges"),
        "certificate": told,
    }


def read_metadata(path: Path) -> dict[str, str]:
    """A `metadata.json`, in the form of a weight file's metadata: each value as JSON text.

    Raises:
        FileNotFoundError: no such file.
        UnsupportedModel: not a JSON object.
    """
    return parse_metadata(path.read_bytes(), str(path))


def parse_metadata(raw: bytes, path: str) -> dict[str, str]:
    """The same of a file's bytes; `path` is where they came from, for errors."""
    try:
        return {key: json.dumps(value) for key, value in json.loads(raw).items()}
    except (AttributeError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: not a JSON object ({error})") from error


def write_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Inverse of `read_metadata`, laid out for people."""
    objects = {key: json.loads(value) for key, value in metadata.items()}
    path.write_text(json.dumps(objects, indent=2) + "\n", encoding="utf-8")


def _base64(array: npt.NDArray[np.float32]) -> str:
    """Little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode("ascii")


def _array(raw: str) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(raw), dtype="<f4")


def _read(metadata: Mapping[str, str], key: str, build: Callable[[dict[str, Any]], T]) -> T:
    if key not in metadata:
        raise UnsupportedModel(f"the weight file has no {key}; convert the model again")
    try:
        raw = json.loads(metadata[key])
        if not isinstance(raw, dict):
            raise TypeError("no JSON object")
        return build(raw)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UnsupportedModel(
            f"{key} is not one this Arrowhead understands ({error}); convert the model again"
        ) from error
