# SPDX-License-Identifier: Apache-2.0
"""Small steps on a GPU, captured as CUDA graphs: one launch in place of a hundred.

A short text is some hundred kernels of a few microseconds each, which Python launches more slowly
than the GPU computes them. A graph repeats a step's kernels, on the memory they were recorded with.
So there is one for each of a few sizes; a step is filled up to the next size with zeros, which
belong to an empty text's place, attend to themselves, and are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arrowhead_engine.packing import Run, Step

# Tokens of a step. Beyond the largest, kernels take so long that launching them keeps pace.
SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TEXTS = 64  # places for texts in each; an empty one costs next to nothing
_NO_LENGTHS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Graph:
    """One size.

    Attributes:
        tokens: T.
        block: the step's memory (`Run.block`), to be filled before each replay.
        replay: computes.
        pooled: what comes out, float32 [TEXTS + 1, D], until the next replay of any graph.
    """

    tokens: int
    block: Tensor
    replay: Callable[[], None]
    pooled: Tensor


class Graphs:
    """A network's small steps. Made and used under `torch.inference_mode`, on one stream."""

    def __init__(self, run: Callable[[Step], Tensor], longest: int, device: torch.device) -> None:
        """Captures every size, the largest first, so that the others find room in its memory.

        Args:
            run: a step to its pooled vectors; the same kernels for all steps of a size.
            longest: tokens of the longest text there can be.
            device: a CUDA device.
        """
        self._device = device
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        graphs = [_graph(run, tokens, longest, device, pool) for tokens in reversed(SIZES)]
        self._graphs = graphs[::-1]

    def __call__(self, run: Run) -> Tensor | None:
        """The pooled vectors, float32 [B, D], until the next call; None if there is no such size.

        The last place is the tail's, of one row at least, or an empty text after a full step would
        have no row to point to.
        """
        tokens, texts = run.tokens, len(run.rows)
        graph = next((graph for graph in self._graphs if graph.tokens > tokens), None)
        if graph is None or texts > TEXTS:
            return None
        block = run.block(graph.tokens, TEXTS + 1, pinned=self._device.type == "cuda")
        graph.block.copy_(block, non_blocking=True)
        graph.replay()
        return graph.pooled[:texts]


def made(run: Callable[[Step], Tensor], longest: int, device: torch.device) -> Graphs | None:
    """The graphs; or None, and a line in the log, where capturing fails."""
    try:
        return Graphs(run, longest, device)
    except RuntimeError as error:
        logging.getLogger(__name__).warning("no CUDA graphs, short texts take longer: %s", error)
        return None


def _graph(
    run: Callable[[Step], Tensor],
    tokens: int,
    longest: int,
    device: torch.device,
    pool: Any,
) -> Graph:
    # As one text of one token, whose tail is the rest: a step like any other.
    row = Run([np.zeros(1, np.int32)], np.ones(1, np.int64), np.zeros(1, np.int64))
    block = row.block(tokens, TEXTS + 1).to(device)
    step = Step.over(block, tokens, min(tokens, longest), tokens, _NO_LENGTHS)
    replay, pooled = capture(lambda: run(step), device, pool)
    return Graph(tokens, block, replay, pooled)


def capture(
    run: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Tensor]:
    """Records what `run` launches: how to do that again, and the tensor it writes.

    As https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs wants it: some runs on a stream
    of their own first, in which libraries set themselves up.
    """
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()
    return graph.replay, out
