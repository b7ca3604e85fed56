# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.gpu`: the encoder and the whole server on a GPU, as a page.

1. The encoder in this process, MiniLM and two random models of MPNet-base's size, and its share of
   the card's own matrix rate.
2. sentence-transformers on the same card in the same dtype, in turns with ours.
3. The server, over gRPC, with one, two and four processes of the encoder.

The server comes first: what is timed in this process holds memory on the card. `--device cpu` goes
the same ways without a card, to see that they go.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from perf.common import Run, common_options, end_as_ctrl_c_does
from perf.copies import with_instances
from perf.load import CONCURRENCIES
from perf.machine import Bystanders, describe, device_name
from perf.profile_load import Latency, LoadFailed, Stream, infer_request, run
from perf.profile_server import MOST_TEXTS
from perf.report import head, table
from perf.run import SOURCE
from perf.server import MODEL, ServeFailed, served
from perf.stats import Sample, interleaved_ms
from perf.texts import Texts, mixed, of_tokens

if TYPE_CHECKING:
    from arrowhead_engine.encoder import Encoder

SHAPES = ((1, 16), (1, 128), (32, 16), (32, 128), (256, 128))  # texts x tokens
PEER_SHAPES = ((1, 16), (32, 16), (32, 128))
BASE = (768, 12)  # MPNet-base's width and layers
CLIENTS = (1, 8, 64, 256)
LARGE_CLIENTS = 8
INSTANCES = (1, 2, 4)
DTYPES = {"cuda": ("float16", "bfloat16"), "cpu": ("float32", "bfloat16")}
MATRIX = {"cuda": 8192, "cpu": 2048}
WANTED = {  # of the project, on an H200
    "one text, p50": "< 1.5 ms",
    "requests of one text": "> 10,000 req/s",
    f"texts in requests of {MOST_TEXTS}": "> 50,000 texts/s",
    "share of the bfloat16 rate, MPNet-base's size, 128 tokens": ">= 30 %",
}


@dataclass(frozen=True)
class Shape:
    """One batch through the encoder alone, ids to vectors.

    Attributes:
        fraction: of the rate of a large matrix product in the same dtype.
    """

    model: str
    dtype: str
    texts: int
    tokens: int
    ms: Sample
    fraction: float


@dataclass(frozen=True)
class Peer:
    """Texts to vectors in this process: sentence-transformers, and ours, in one dtype."""

    texts: int
    tokens: int
    peer_ms: Sample
    ours_ms: Sample


@dataclass(frozen=True)
class Loaded:
    """The server with so many processes of the encoder.

    Attributes:
        single: new texts of 5 to 60 words, one a request, by clients.
        large: requests of `MOST_TEXTS` such texts.
    """

    instances: int
    single: dict[int, Latency]
    large: Latency


@dataclass(frozen=True)
class GpuResults(Run):
    """All of it.

    Attributes:
        device: its name. dtype: in which it is compared with sentence-transformers.
        graphs: whether small steps were captured.
        matrix_tflops: the rate of a large matrix product, by dtype.
    """

    device: str
    dtype: str
    graphs: bool
    matrix_tflops: dict[str, float]
    shapes: list[Shape]
    peers: list[Peer]
    loads: list[Loaded]


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run; its figures are rough.")
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="cpu only shows that all of this works.",
)
@common_options
def main(quick: bool, device: str, repository: Path, out: Path) -> None:
    """Measure the encoder and the server on a GPU, beside sentence-transformers."""
    end_as_ctrl_c_does()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here leaves the machine
    from arrowhead_engine.compute import has_cuda

    if device == "cuda" and not has_cuda():
        raise click.ClickException("torch sees no CUDA device; --device cpu shows that all works")
    try:
        results = measure(device, repository, quick=quick)
    except (ServeFailed, LoadFailed, ValueError) as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(results.to_json(), encoding="utf-8")
    (out / "gpu.md").write_text(page(results), encoding="utf-8")
    click.echo(f"{results.seconds:.0f} s; {out / 'gpu.md'}")


def measure(device: str, repository: Path, *, quick: bool) -> GpuResults:
    """Everything, the server first."""
    began, machine, others = time.monotonic(), describe(), Bystanders()
    counts, seconds = (INSTANCES[:1], 0.5) if quick else (INSTANCES, 4.0)
    loads = []
    for count in counts:
        click.echo(f"server: {count} of the encoder", err=True)
        others.look()
        loads.append(_load(repository, count, seconds))
    click.echo("encoder, and sentence-transformers", err=True)
    others.look()
    timed = _Timed(device, repository, quick=quick)
    return GpuResults(
        machine=machine,
        quick=quick,
        seconds=time.monotonic() - began,
        other_work=Sample.of(others.percent),
        device=timed.name,
        dtype=DTYPES[device][0],
        graphs=timed.graphs,
        matrix_tflops=timed.matrix_tflops,
        shapes=timed.shapes,
        peers=timed.peers,
        loads=loads,
    )


def _load(repository: Path, count: int, seconds: float) -> Loaded:
    source = Texts(seed=80 + count)
    with tempfile.TemporaryDirectory(prefix="arrowhead-gpu-") as name:
        copy = with_instances(repository, Path(name) / "repository", count)
        with served(copy) as server:

            def sent(clients: int, texts: int, most: int) -> Latency:
                new = [[mixed(source) for _ in range(texts)] for _ in range(most)]
                requests = [infer_request(own) for own in new]
                return Latency.of(run(Stream(server.address, requests, clients, seconds)))

            sent(CONCURRENCIES[1], 1, 200)  # warms up
            rate = 40_000 if seconds > 1 else 4_000  # no more than could be answered
            single = {n: sent(n, 1, int(rate * seconds * min(n, 32) / 32)) for n in CLIENTS}
            large = sent(LARGE_CLIENTS, MOST_TEXTS, int(rate / 40 * seconds))
            return Loaded(count, single, large)


class _Timed:
    """What is timed in this process. Imports torch, and so comes last."""

    def __init__(self, device: str, repository: Path, *, quick: bool) -> None:
        import torch

        from arrowhead_engine.encoder import Encoder
        from arrowhead_engine.torch_engine import TorchEngine
        from perf.engine import flop_per_text, matmul_gflops, matmuls
        from perf.scaling import random_ids, random_model

        on, dtypes, size = torch.device(device), DTYPES[device], MATRIX[device]
        self.name = device_name(device)
        shapes = SHAPES[:3] if quick else SHAPES
        calls: dict[str, Callable[[], object]] = {}
        encoders: dict[tuple[str, str], Encoder] = {}
        with tempfile.TemporaryDirectory(prefix="arrowhead-gpu-") as folder:
            files = {"MiniLM": repository / f"{MODEL}_encoder" / "1" / "weights.parquet"}
            for kind in () if quick else ("bert", "mpnet"):
                files[f"{kind}, MPNet-base's size"] = path = Path(folder) / kind
                random_model(path, *BASE, kind)
            for model, path in files.items():
                for dtype in dtypes:
                    encoders[model, dtype] = Encoder.open(
                        path, device=device, dtype=dtype, engine="torch"
                    )
        first = encoders["MiniLM", dtypes[0]]
        engine = first._engine
        self.graphs = isinstance(engine, TorchEngine) and engine._graphs is not None
        for dtype in dtypes:
            for make, product in matmuls(dtype, on, size).items():
                calls[f"matrix {dtype} {make}"] = product
            for model in files:
                for shape in shapes:
                    own = random_ids(*shape)
                    calls[f"{model} {dtype} {shape}"] = partial(encoders[model, dtype].embed, own)
        calls |= self._beside(device, repository, first)
        rounds, slice_ms = (2, 0.0) if quick else (12, 60.0)
        taken = interleaved_ms(calls, rounds=rounds, slice_ms=slice_ms, limit_s=120.0)
        ms = {name: Sample.of(values) for name, values in taken.items()}
        self.matrix_tflops = {
            dtype: matmul_gflops(
                min(one.low for name, one in ms.items() if name.startswith(f"matrix {dtype} ")),
                size,
            )
            / 1e3
            for dtype in dtypes
        }
        self.shapes = [
            Shape(
                model,
                dtype,
                *shape,
                (one := ms[f"{model} {dtype} {shape}"]),
                shape[0]
                * flop_per_text(encoders[model, dtype].spec, shape[1])
                / one.median
                / 1e9
                / self.matrix_tflops[dtype],
            )
            for model, dtype in encoders
            for shape in shapes
        ]
        self.peers = [
            Peer(*shape, ms[f"peer {shape}"], ms[f"ours {shape}"]) for shape in PEER_SHAPES
        ]

    def _beside(
        self, device: str, repository: Path, encoder: Encoder
    ) -> dict[str, Callable[[], object]]:
        from sentence_transformers import SentenceTransformer

        from arrowhead_conversion.sources import locate
        from arrowhead_engine.tensors import DTYPES as TORCH_DTYPES
        from arrowhead_engine.tokenizer import Tokenizer

        checkpoint = str(locate(SOURCE))
        loaded = SentenceTransformer(checkpoint, device=device, local_files_only=True)
        peer = loaded.to(TORCH_DTYPES[encoder.compute.dtype])
        tokenizer = Tokenizer.open(repository / f"{MODEL}_tokenizer" / "1")

        def ours(texts: Sequence[str]) -> object:
            ids, _ = tokenizer.encode(texts)
            return encoder.embed([np.array(row, np.int32) for row in ids])

        calls: dict[str, Callable[[], object]] = {}
        for texts, tokens in PEER_SHAPES:
            source, new = Texts(seed=texts), of_tokens(tokens)
            own = [new(source) for _ in range(texts)]
            calls[f"peer {(texts, tokens)}"] = partial(peer.encode, own, show_progress_bar=False)
            calls[f"ours {(texts, tokens)}"] = partial(ours, own)
        return calls


def page(results: GpuResults) -> str:
    """The page; every number on it comes from the results."""
    one = results.loads[0]
    best = max(load.single[n].requests_s.median for load in results.loads for n in load.single)
    large = max(load.large.requests_s.median for load in results.loads) * MOST_TEXTS
    shares = [s.fraction for s in results.shapes if s.tokens == 128 and "bert," in s.model]
    measured = [
        f"{one.single[1].p50_ms.show()} ms",
        f"{best:,.0f} req/s",
        f"{large:,.0f} texts/s",
        f"{100 * max(shares):.0f} %" if shares else "not measured",
    ]
    rates = ", ".join(f"{dtype} {rate:,.1f}" for dtype, rate in results.matrix_tflops.items())
    parts = [
        *head(
            results,
            "On a GPU",
            "Written by `python -m perf.gpu`; overwritten by each run. Figures are medians, with "
            "the lowest and highest in brackets.",
            facts=[
                ("device", results.device),
                ("TFLOP/s of a large matrix product", rates),
                ("small steps", "CUDA graphs" if results.graphs else "launched one by one"),
            ],
        ),
        "## What is aimed at, on an H200",
        table(
            ["", "wanted", "measured"],
            [(*wanted, met) for wanted, met in zip(WANTED.items(), measured, strict=True)],
        ),
        "## The encoder alone, ids to vectors",
        table(
            ["model", "dtype", "texts x tokens", "ms", "texts/s", "share of the matrix rate"],
            [
                (
                    s.model,
                    s.dtype,
                    f"{s.texts} x {s.tokens}",
                    s.ms.show(),
                    f"{1e3 * s.texts / s.ms.median:,.0f}",
                    f"{100 * s.fraction:.1f} %",
                )
                for s in results.shapes
            ],
        ),
        f"## MiniLM beside sentence-transformers, texts to vectors, both {results.dtype}",
        table(
            ["texts x tokens", "sentence-transformers, ms", "ours, ms", "times as fast"],
            [
                (
                    f"{p.texts} x {p.tokens}",
                    p.peer_ms.show(),
                    p.ours_ms.show(),
                    f"{p.peer_ms.median / p.ours_ms.median:.2f}",
                )
                for p in results.peers
            ],
        ),
        "## The server, over gRPC",
        "Texts of 5 to 60 words, none of them twice; by processes of the encoder. The load comes "
        "from one Python process, which is itself the limit at some thousands of requests a "
        "second; `make perf` has the same loads from perf_analyzer.",
        table(
            ["encoders", "clients", "texts a request", "p50, ms", "p99, ms", "texts/s"],
            [
                (
                    f"{load.instances}",
                    f"{clients}",
                    f"{texts}",
                    seen.p50_ms.show(),
                    seen.p99_ms.show(),
                    f"{texts * seen.requests_s.median:,.0f}",
                )
                for load in results.loads
                for clients, texts, seen in [
                    *((n, 1, load.single[n]) for n in load.single),
                    (LARGE_CLIENTS, MOST_TEXTS, load.large),
                ]
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
