# SPDX-License-Identifier: Apache-2.0
"""The networks by HuggingFace's `model_type`: BERT and its kin, and those that need torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from arrowhead_engine import bert, distilbert, mpnet
from arrowhead_engine.sizes import PostNorm, Shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from arrowhead_engine.packing import Step
    from arrowhead_engine.tensors import Tensors


class Config(Protocol):
    """What every network's configuration tells."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def most_tokens(self) -> int:
        """The longest text the network takes."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""


class Network(Protocol):
    """`Step` -> token vectors float32 [T, D].

    Attributes:
        ragged: whether texts of any length attend as they lie, so that all steps of a size are the
            same work.
    """

    ragged: bool

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        config: its sizes out of a `config.json`.
        shapes: its tensors.
        prefix: what some checkpoints put before every name (of the general path, its
            configuration knows).
        dropped: beginnings of names that are no part of a sentence embedding.
        network: built in torch from config, tensors and compute dtype.
        plan: of BERT and its kin, what there is to compute.
    """

    config: Callable[[dict[str, Any]], Any]
    shapes: Callable[[Any], Shapes]
    network: Callable[[Any, Tensors, torch.dtype], Network]
    prefix: str
    dropped: tuple[str, ...]
    plan: Callable[[Any], PostNorm] | None = None


HEADS = ("pooler.", "lm_head.", "cls.", "embeddings.position_ids")  # of other tasks


def _post_norm(
    config: Callable[[dict[str, Any]], Any],
    shapes: Callable[[Any], Shapes],
    plan: Callable[[Any], PostNorm],
    *,
    prefix: str,
    dropped: tuple[str, ...] = HEADS,
) -> Architecture:
    def network(config: Any, tensors: Tensors, dtype: torch.dtype) -> Network:
        from arrowhead_engine.postnorm import PostNormNetwork  # imports torch

        return PostNormNetwork(plan(config), config.most_tokens, tensors, dtype)

    return Architecture(config, shapes, network, prefix, dropped, plan)


_ROBERTA = _post_norm(bert.RobertaConfig.from_dict, bert.shapes, bert.plan, prefix="roberta.")
POST_NORM = {
    "bert": _post_norm(bert.BertConfig.from_dict, bert.shapes, bert.plan, prefix="bert."),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _post_norm(
        distilbert.DistilBertConfig.from_dict,
        distilbert.shapes,
        distilbert.plan,
        prefix="distilbert.",
        dropped=("vocab_",),
    ),
    "mpnet": _post_norm(mpnet.MPNetConfig.from_dict, mpnet.shapes, mpnet.plan, prefix="mpnet."),
}
WITH_A_FILE = (*POST_NORM, "modernbert", "nomic_bert")


def architecture(name: str) -> Architecture:
    """The network of that name: with a file here, or through transformers."""
    if name in POST_NORM:
        return POST_NORM[name]
    from arrowhead_engine import networks  # imports torch, which the others can do without

    return networks.ON_TORCH.get(name, networks.GENERAL)
