# SPDX-License-Identifier: Apache-2.0
"""The GPU's way through a network, on a CPU: texts as they lie, and small steps of fixed sizes.

What only a GPU has is stood in for: FlashAttention by attention text by text, and a graph's replay
by computing again on the memory it was recorded with. All that feeds them is the real thing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from arrowhead_engine import graphs, layers
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.graphs import LONGEST, SIZES, TAIL, TEXTS, Graphs
from arrowhead_engine.packing import Step, runs
from arrowhead_engine.spec import Ids
from arrowhead_engine.torch_engine import POOL, TorchEngine

from .random_models import configs, model_file

CPU = torch.device("cpu")
FEW = (16, 96, 512, 1024)  # sizes, where a network computes for each
# In every mix: alone, equal, mixed, as many texts as there are places, one more, too many tokens.
MIXES = [
    [1],
    [15],
    [16],
    [7, 7, 7],
    [2, 150, 3, 64, 65, 9],
    [3] * TEXTS,
    [3] * (TEXTS + 1),
    [150] * 20,
]


def attend_text_by_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    starts_of_keys: Tensor,
    longest: int,
    longest_key: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes: [T, H, D/H] -> the same."""
    assert starts is starts_of_keys
    assert longest == longest_key
    assert starts.dtype == torch.int32
    out = torch.full_like(q, float("nan"))  # what it leaves where no text is
    for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert last - first <= longest or last == len(q)
        own = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        places = torch.arange(last - first)
        near = (places[:, None] - places[None, :]).abs() <= window_size[0]
        mask = None if window_size == (-1, -1) else near
        if last > first:
            out[first:last] = F.scaled_dot_product_attention(*own, attn_mask=mask)[0].transpose(
                0, 1
            )
    return out


def replay_by_computing_again(
    run: Callable[[], Tensor], stream: object, pool: object
) -> tuple[Callable[[], None], Tensor]:
    """As a graph: always the same memory in and out, and only what stands there then counts."""
    out = run().clone()

    def replay() -> None:
        out.copy_(run())

    return replay, out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        name: model_file(name, configs()[name], folder / name)[1]
        for name in ("bert", "distilbert", "modernbert", "nomic_bert")
    }


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "varlen_attn", attend_text_by_text)
    monkeypatch.setattr(graphs, "capture", replay_by_computing_again)
    monkeypatch.setattr(graphs, "SIZES", FEW)
    for name in ("postnorm", "modernbert", "nomicbert"):
        monkeypatch.setattr(f"arrowhead_engine.{name}.ragged", lambda *_: True)


def with_graphs(encoder: Encoder) -> TorchEngine:
    engine = encoder._engine
    assert isinstance(engine, TorchEngine)
    with torch.inference_mode():
        engine._graphs = Graphs(engine._pooled, 150, CPU)
    return engine


def rows_of(lengths: list[int], vocabulary: int = 500) -> list[Ids]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(5, vocabulary, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("lengths", MIXES, ids=lambda mix: f"{len(mix)}x{max(mix)}")
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert", "nomic_bert"])
def test_as_they_lie_and_replayed_gives_what_groups_give(
    architecture: str, lengths: list[int], request: pytest.FixtureRequest, files: dict[str, Path]
) -> None:
    path = files[architecture]
    rows = rows_of(lengths)
    wanted = Encoder.open(path, device="cpu", dtype="float32", engine="torch").embed(rows)
    request.getfixturevalue("like_a_gpu")
    encoder = Encoder.open(path, device="cpu", dtype="float32", engine="torch")
    np.testing.assert_allclose(encoder.embed(rows), wanted, atol=2e-6)  # launched one by one
    engine = with_graphs(encoder)
    launched: list[Step] = []
    network = engine.network
    engine.network = lambda step: launched.append(step) or network(step)  # type: ignore
    for _ in range(2):  # what the first left in a graph's memory is not looked at
        np.testing.assert_allclose(encoder.embed(rows[::-1])[::-1], wanted, atol=2e-6)
        small = sum(lengths) <= FEW[-1] and len(lengths) <= TEXTS
        assert {len(step.input_ids) - TAIL in FEW for step in launched} == {small}
        encoder.embed(rows_of([5, 1, 90]))
        launched.clear()


@pytest.mark.parametrize("pooling", POOL)
def test_every_pooling_leaves_the_tail_out(
    pooling: str, like_a_gpu: None, minilm_weights: Path
) -> None:
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32", engine="torch")
    engine = encoder._engine
    assert isinstance(engine, TorchEngine)
    engine._pools = [POOL[pooling]]
    rows = rows_of([3, 1, 31, 9])
    wanted = engine(rows, None)
    np.testing.assert_allclose(with_graphs(encoder)(rows, None), wanted, atol=1e-5)


def test_texts_whose_prompt_does_not_count_go_without_a_graph(
    like_a_gpu: None, minilm_weights: Path
) -> None:
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32", engine="torch")
    rows = rows_of([9, 4])
    wanted = encoder._engine(rows, [2, 1])
    np.testing.assert_array_equal(with_graphs(encoder)(rows, [2, 1]), wanted)
    assert np.abs(wanted - encoder._engine(rows, None)).max() > 1e-3


def test_a_step_takes_the_smallest_size_that_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", replay_by_computing_again)
    seen: list[int] = []

    def pooled(step: Step) -> Tensor:
        seen.append(len(step.input_ids) - TAIL)
        return step.starts[:, None].float()

    made = Graphs(pooled, 2000, CPU)
    assert seen == sorted(SIZES, reverse=True)
    mixes = [([1], 16), ([16], 16), ([17], 32), ([100] * 20, 2048), ([1] * 17, 192)]
    for lengths, size in [*mixes, ([64] * TEXTS, 8192), ([LONGEST], 1024)]:
        seen.clear()
        (run,) = runs(rows_of(lengths), 100_000)
        assert made(run) is not None
        assert seen == [size]
    for lengths in ([64] * TEXTS + [1], [1] * (TEXTS + 1), [LONGEST + 1]):
        (run,) = runs(rows_of(lengths), 100_000)
        assert made(run) is None


@pytest.mark.parametrize(
    ("dtype", "width", "so"),
    [
        (torch.float16, 32, True),
        (torch.bfloat16, 64, True),
        (torch.float16, 26, False),
        (torch.float16, 264, False),
        (torch.float32, 32, False),
    ],
)
@pytest.mark.skipif(layers.varlen_attn is None, reason="an older torch")
def test_flash_attention_is_given_what_it_takes(
    dtype: torch.dtype, width: int, so: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert layers.ragged(torch.device("cuda"), dtype, width) is so


def test_where_capturing_fails_there_are_no_graphs_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", fails)
    assert graphs.made(lambda step: step.starts, 512, CPU) is None
    assert "no CUDA graphs, short texts take longer: operation not permitted" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu_graphs_are_captured_and_give_what_the_cpu_gives(
    dtype: str, minilm_weights: Path
) -> None:
    encoder = Encoder.open(minilm_weights, device="cuda", dtype=dtype)
    engine = encoder._engine
    assert isinstance(engine, TorchEngine)
    assert engine._graphs is not None
    plain = Encoder.open(minilm_weights, device="cpu", dtype="float32")
    for _ in range(2):
        for lengths in [*MIXES, [150] * 60]:
            rows = rows_of(lengths, 30000)
            met, wanted = encoder.embed(rows), plain.embed(rows)
            assert (met * wanted).sum(1).min() >= 0.9995
