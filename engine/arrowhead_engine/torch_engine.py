# SPDX-License-Identifier: Apache-2.0
"""The torch engine: every network, CPU and CUDA. Ids -> pooled vectors, by packed steps.

Each pooling takes

- the token vectors float32 [T, D] that count,
- how many of them belong to each text, int32 or int64 [B], the texts lying end to end,
- the place in its text of each text's first token that counts, [B]: 0, or the length of a prompt
  that is left out,

and gives [B, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from arrowhead_engine.architectures import Architecture, Config
from arrowhead_engine.compute import Compute
from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.graphs import made
from arrowhead_engine.packing import Run, Step, runs
from arrowhead_engine.spec import Ids
from arrowhead_engine.tensors import DTYPES, Tensors
from arrowhead_engine.weightfile import WeightFile

# Tokens that go through the network at once. More brings no speed on a CPU and costs memory; a GPU
# wants more to be busy.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
# How padded groups may attend on a GPU. Not by cuDNN, which torch would take on Hopper: it makes a
# plan for each shape it meets, which takes up to half a second, and groups come in any shape.
ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def mean(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The mean of a text's token vectors, special tokens included."""
    return torch.segment_reduce(tokens, "mean", lengths=lengths, unsafe=True)


def cls(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The vector of a text's first token."""
    return tokens.index_select(0, lengths.cumsum(0) - lengths)


def mean_sqrt_len(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The sum of a text's token vectors over the square root of their number."""
    return mean(tokens, lengths, first) * lengths.sqrt()[:, None]


def weighted_mean(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The mean of a text's token vectors, each weighing its place in the text, counted from 1."""
    starts = lengths.cumsum(0) - lengths - first
    weights = torch.arange(1, len(tokens) + 1, device=tokens.device)
    # Told how many come out, it need not wait for the GPU to say.
    weights = weights - starts.repeat_interleave(lengths, output_size=len(tokens))
    total = mean(tokens * weights[:, None], lengths, first) * lengths[:, None]
    return total / (lengths * (2 * first + lengths + 1) / 2)[:, None]


def maximum(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The largest value of each component over a text's tokens."""
    return torch.segment_reduce(tokens, "max", lengths=lengths, unsafe=True)


def last(tokens: Tensor, lengths: Tensor, first: Tensor) -> Tensor:
    """The vector of a text's last token."""
    return tokens.index_select(0, lengths.cumsum(0) - 1)


POOL = {
    "mean": mean,
    "cls": cls,
    "max": maximum,
    "mean_sqrt_len_tokens": mean_sqrt_len,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}


class TorchEngine:
    """A network and its poolings, in torch."""

    def __init__(
        self,
        weights: WeightFile,
        kind: Architecture,
        config: Config,
        poolings: Sequence[str],
        compute: Compute,
    ) -> None:
        try:
            self.device, dtype = torch.device(compute.device), DTYPES[compute.dtype]
            tensors = Tensors(weights, self.device)
        except RuntimeError as error:
            raise UnsupportedModel(f"device {compute.device!r}: {error}") from error
        self.token_budget = TOKEN_BUDGET[self.device.type]
        self._pools = [POOL[name] for name in poolings]
        with self._computing():
            self.network = kind.network(config, tensors, dtype)
            self._graphs = None
            if self.device.type == "cuda" and self.network.ragged:
                self._graphs = made(self._pooled, config.most_tokens, self.device)

    def __call__(self, ids: Sequence[Ids], skips: Sequence[int] | None) -> npt.NDArray[np.float32]:
        """The pooled vectors, float32 [B, poolings x D]; `skips` tokens of each do not count."""
        parts, orders = [], []
        with self._computing():
            for run in runs(ids, self.token_budget):
                # On a GPU this only says what is to be done, so that one step's texts are packed
                # while the one before is computed.
                parts.append(self._to_host(self._run(run, skips)))
                orders.append(run.order)
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        sorted_ = np.concatenate([part.numpy() for part in parts])
        out: npt.NDArray[np.float32] = np.empty_like(sorted_)
        out[np.concatenate(orders)] = sorted_
        return out

    @contextmanager
    def _computing(self) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        with torch.inference_mode(), torch.cuda.device(self.device) if cuda else nullcontext():
            yield

    def _run(self, run: Run, skips: Sequence[int] | None) -> Tensor:
        if skips is None and self._graphs is not None:
            pooled = self._graphs(run)
            if pooled is not None:
                return pooled
        step = Step.of(run, self.device)
        padded = self.device.type == "cuda" and not self.network.ragged
        with sdpa_kernel(ATTENTIONS) if padded else nullcontext():
            return self._pooled(step, None if skips is None else [skips[i] for i in run.order])

    def _to_host(self, pooled: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return pooled
        # Memory that the GPU writes by itself; whole once the stream is synchronized.
        host = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
        return host.copy_(pooled, non_blocking=True)

    def _pooled(self, step: Step, skips: Sequence[int] | None = None) -> Tensor:
        """One vector a text, float32 [B, D x poolings]; `skips` in the step's order."""
        tokens = self.network(step)
        lengths = step.starts.diff()
        first = torch.zeros_like(lengths)
        if skips is not None:
            first = torch.tensor(skips, device=lengths.device)
            tokens = tokens[step.positions[: step.real] >= first.repeat_interleave(lengths)]
            lengths = lengths - first
        return torch.cat([pool(tokens, lengths, first) for pool in self._pools], dim=1)
