# SPDX-License-Identifier: Apache-2.0
"""Small steps on a GPU, captured as CUDA graphs: one launch in place of a hundred.

A short text is some hundred kernels of a few microseconds each, which Python launches more slowly
than the GPU computes them. A graph repeats a step's kernels, on the memory they were recorded with.
So there is one for each of a few sizes; a step is filled up to the next size with zeros, which
belong to places without a text, attend to themselves, and are dropped.
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

# Tokens that fit. Beyond the largest, kernels take so long that launching them keeps pace: a layer
# is a dozen launches, of which FlashAttention's alone takes Python a tenth of a millisecond.
SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# Rows after them, so that a place without a text always has one to point to. Products like eights.
TAIL = 8
# Places for texts at most, and tokens of one. Attention starts a block of threads for every 128
# tokens that a place could have, even if it has none: all these would be felt if there were more.
TEXTS, LONGEST = 128, 1024
_NO_LENGTHS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Graph:
    """One size.

    Attributes:
        tokens: that fit. texts: that fit.
        block: the step's memory (`Run.block`), to be filled before each replay.
        replay: computes.
        pooled: what comes out, float32 [texts + 1, D], until the next replay of any graph.
    """

    tokens: int
    texts: int
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
        self._cuda, self._longest = device.type == "cuda", min(longest, LONGEST)
        # One of each for all: cuBLAS keeps 32 MB for every stream that it has seen.
        pool = torch.cuda.graph_pool_handle() if self._cuda else None
        stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

        def graph(tokens: int) -> Graph:
            texts = places(tokens)
            # As one text of one token, and the rest is tail: a step like any other.
            row = Run([np.zeros(1, np.int32)], np.ones(1, np.int64), np.zeros(1, np.int64))
            rows = tokens + TAIL
            block = row.block(rows, texts + 1).to(device)
            step = Step.over(block, rows, min(rows, self._longest), rows, _NO_LENGTHS)
            replay, pooled = capture(lambda: run(step), stream, pool)
            return Graph(tokens, texts, block, replay, pooled)

        self._graphs = [graph(tokens) for tokens in reversed(SIZES)][::-1]

    def __call__(self, run: Run) -> Tensor | None:
        """The pooled vectors, float32 [B, D], until the next call; None if no size fits."""
        tokens, texts = run.tokens, len(run.rows)
        fitting = (g for g in self._graphs if g.tokens >= tokens and g.texts >= texts)
        graph = next(fitting, None)
        if graph is None or run.lengths[-1] > self._longest:
            return None
        block = run.block(graph.tokens + TAIL, graph.texts + 1, pinned=self._cuda)
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


def places(tokens: int) -> int:
    """For how many texts a step of that size has room: short ones are rarely below 8 tokens."""
    return min(TEXTS, max(16, tokens // 8))


def capture(run: Callable[[], Tensor], stream: Any, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Records what `run` launches: how to do that again, and the tensor it writes.

    As https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs wants it: some runs on a stream
    of their own first, in which libraries set themselves up.
    """
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # a capture that fails does not leave its stream by itself
        for _ in range(3):
            run()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = run()
    here.wait_stream(stream)
    return graph.replay, out
