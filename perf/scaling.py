# SPDX-License-Identifier: Apache-2.0
"""How the engine's cost grows in this process: with the batch, the length, and the model.

Every series begins with little work and ends with much; what is compared is the cost of a token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from arrowhead_engine.architectures import architecture
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.spec import MODEL_KEY, Ids, ModelSpec
from arrowhead_engine.weightfile import Tensor
from arrowhead_engine.weightwriter import write
from perf.server import MODEL
from perf.stats import Sample, interleaved_ms

DTYPES = ("float32", "bfloat16", "int8")
BATCH_TOKENS = 16
BATCHES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LONGER_TOKENS = 128
LONGER_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 16)
LENGTHS = (*range(8, 65, 4), *range(72, 129, 8), *range(144, 257, 16))
FILLED_TOKENS = 2048
FILLED_LENGTHS = (8, 16, 32, 64, 128, 256)
SIZES = ((384, 6), (768, 12), (1024, 24))  # width, layers
SIZE_SHAPES = ((1, 16), (8, 16), (1, 128))  # texts, tokens
MOST_TOKENS = 256
_VOCABULARY = 30522
CLIFF = 1.25  # times the cost of a token at the point before
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Point:
    """One shape: so many texts of so many tokens, and the microseconds that a token takes."""

    texts: int
    tokens: int
    us: Sample

    @property
    def all_tokens(self) -> int:
        """Of all texts together."""
        return self.texts * self.tokens


@dataclass(frozen=True)
class Step:
    """Two neighbouring points, and how many times the cost of the first the second one is.

    Of their lowest costs: others' work on the machine only ever adds to them.
    """

    series: str
    dtype: str
    before: Point
    after: Point
    ratio: float


@dataclass(frozen=True)
class Series:
    """One way of growing, in one compute dtype."""

    name: str
    dtype: str
    points: list[Point]

    def steps(self) -> list[Step]:
        """From each point to the next."""
        return [
            Step(self.name, self.dtype, a, b, b.us.low / a.us.low)
            for a, b in zip(self.points, self.points[1:], strict=False)
        ]


@dataclass(frozen=True)
class Size:
    """A model of random weights, stored as float16.

    Attributes:
        parameters: of the linear layers, all of which every token meets.
        load_s: opening the file and laying its weights out; not verified.
    """

    width: int
    layers: int
    dtype: str
    parameters: int
    load_s: float
    points: list[Point]


@dataclass(frozen=True)
class ScalingResults:
    """What was found.

    Attributes:
        engine: "native" or "torch", by dtype.
        missing: dtypes that are not to be had here, and why.
    """

    engine: dict[str, str]
    missing: dict[str, str]
    series: list[Series]
    sizes: list[Size]

    def largest_rise(self, name: str) -> Step:
        """The step in that series, of any dtype, at which a token becomes dearer the most."""
        steps = [step for one in self.series if one.name == name for step in one.steps()]
        return max(steps, key=lambda step: step.ratio)

    def names(self) -> list[str]:
        """Of all series, each once."""
        return list(dict.fromkeys(one.name for one in self.series))


@dataclass(frozen=True)
class Shapes:
    """What to measure: texts x tokens by series, and the models' sizes."""

    series: dict[str, Sequence[tuple[int, int]]]
    sizes: Sequence[tuple[int, int]]
    rounds: int
    slice_ms: float
    limit_s: float


def series_of(*, quick: bool) -> dict[str, Sequence[tuple[int, int]]]:
    """The series; of a smoke run every third point."""
    step = 3 if quick else 1
    return {
        f"batch: texts of {BATCH_TOKENS} tokens": [(n, BATCH_TOKENS) for n in BATCHES[::step]],
        f"batch: texts of {LONGER_TOKENS} tokens": [
            (n, LONGER_TOKENS) for n in LONGER_BATCHES[::step]
        ],
        "length: one text": [(1, n) for n in LENGTHS[::step]],
        f"length: {FILLED_TOKENS} tokens of texts": [
            (FILLED_TOKENS // n, n) for n in FILLED_LENGTHS[::step]
        ],
    }


def measure(repository: Path, shapes: Shapes, say: Callable[[str], None]) -> ScalingResults:
    """Times all series on the served model, then the models of random weights, in turns."""
    say("scaling: batch and length")
    weights = repository / f"{MODEL}_encoder" / "1" / "weights.parquet"
    encoders, missing = _encoders(weights)
    calls = {
        (name, dtype, shape): partial(encoder.embed, random_ids(*shape))
        for name, grown in shapes.series.items()
        for shape in grown
        for dtype, encoder in encoders.items()
    }
    ms = _times(calls, shapes)
    series = [
        Series(name, dtype, [_point(shape, ms[name, dtype, shape]) for shape in grown])
        for name, grown in shapes.series.items()
        for dtype in encoders
    ]
    engine = {dtype: encoder.compute.engine for dtype, encoder in encoders.items()}
    del encoders, calls
    sizes: list[Size] = []
    for width, layers in shapes.sizes:
        say(f"scaling: a model of width {width}, {layers} layers")
        sizes += _size(width, layers, shapes)
    return ScalingResults(engine, missing, series, sizes)


def random_ids(texts: int, tokens: int, seed: int = 71) -> list[Ids]:
    """Ids of some different texts of one length."""
    drawn = np.random.default_rng(seed).integers(1000, 30000, (texts, tokens))
    return list(drawn.astype(np.int32))


def random_model(path: Path, width: int, layers: int, kind: str = "bert") -> int:
    """Writes a BERT, or its kin, of random float16 weights; returns how many its layers have."""
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // (32 if width < 768 else 64),
        "intermediate_size": 4 * width,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 512,
    }
    spec = ModelSpec(kind, config, "mean", True, MOST_TOKENS, width)
    network = architecture(kind)
    # Drawn once and repeated: the speed does not depend on the numbers, and time is short.
    noise = np.random.default_rng(width).normal(0, 0.03, 1 << 20).astype(np.float16)
    shapes = network.shapes(network.config(config))

    def tensors() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            values = np.resize(noise, shape)
            if name.endswith("LayerNorm.weight"):
                values = values + np.float16(1)
            yield Tensor(name, "float16", shape, values.tobytes())

    write(path, tensors(), {MODEL_KEY: spec.to_json()})
    linear = (shape for name, shape in shapes.items() if len(shape) == 2 and "layer." in name)
    return sum(rows * columns for rows, columns in linear)


def _encoders(weights: Path) -> tuple[dict[str, Encoder], dict[str, str]]:
    """An encoder in every dtype that there is, by the native engine where it has it."""
    found: dict[str, Encoder] = {}
    missing: dict[str, str] = {}
    for dtype in DTYPES:
        try:
            found[dtype] = Encoder.open(weights, device="cpu", dtype=dtype)
        except UnsupportedModel as error:
            missing[dtype] = str(error)
    return found, missing


def _size(width: int, layers: int, shapes: Shapes) -> list[Size]:
    """One model in every dtype, one after the other: three copies of a large one are many GB."""
    found: list[Size] = []
    with tempfile.TemporaryDirectory(prefix="arrowhead-profile-") as name:
        path = Path(name) / "weights.parquet"
        parameters = random_model(path, width, layers)
        for dtype in DTYPES:
            began = time.perf_counter()
            try:
                encoder = Encoder.open(path, device="cpu", dtype=dtype)
            except UnsupportedModel:
                continue
            load_s = time.perf_counter() - began
            calls = {shape: partial(encoder.embed, random_ids(*shape)) for shape in SIZE_SHAPES}
            ms = _times(calls, shapes)
            points = [_point(shape, ms[shape]) for shape in SIZE_SHAPES]
            found.append(Size(width, layers, dtype, parameters, load_s, points))
            del encoder, calls
    return found


def _times(calls: Mapping[K, Callable[[], object]], shapes: Shapes) -> dict[K, list[float]]:
    """`interleaved_ms` with other keys."""
    named = {str(i): call for i, call in enumerate(calls.values())}
    taken = interleaved_ms(
        named, rounds=shapes.rounds, slice_ms=shapes.slice_ms, limit_s=shapes.limit_s
    )
    return dict(zip(calls, taken.values(), strict=True))


def _point(shape: tuple[int, int], ms: Sequence[float]) -> Point:
    texts, tokens = shape
    return Point(texts, tokens, Sample.of([one * 1e3 / (texts * tokens) for one in ms]))
