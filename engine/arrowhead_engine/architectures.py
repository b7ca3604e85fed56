# SPDX-License-Identifier: Apache-2.0
"""The networks by HuggingFace's `model_type`: those with a file here, else transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from arrowhead_engine import bert, distilbert, general, modernbert, mpnet, nomicbert
from arrowhead_engine.layers import Shapes
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
    """`Step` -> token vectors float32 [T, D]."""

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        config: its sizes out of a `config.json`.
        shapes: its tensors.
        network: built from config, tensors and compute dtype.
        prefix: what some checkpoints put before every name (of the general path, its
            configuration knows).
        dropped: beginnings of names that are no part of a sentence embedding.
    """

    config: Callable[[dict[str, Any]], Any]
    shapes: Callable[[Any], Shapes]
    network: Callable[[Any, Tensors, torch.dtype], Network]
    prefix: str
    dropped: tuple[str, ...]


HEADS = ("pooler.", "lm_head.", "cls.", "embeddings.position_ids")  # of other tasks
_ROBERTA = Architecture(
    bert.RobertaConfig.from_dict, bert.shapes, bert.Bert, prefix="roberta.", dropped=HEADS
)
ARCHITECTURES = {
    "bert": Architecture(
        bert.BertConfig.from_dict, bert.shapes, bert.Bert, prefix="bert.", dropped=HEADS
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Architecture(
        distilbert.DistilBertConfig.from_dict,
        distilbert.shapes,
        distilbert.DistilBert,
        prefix="distilbert.",
        dropped=("vocab_",),
    ),
    "mpnet": Architecture(
        mpnet.MPNetConfig.from_dict, mpnet.shapes, mpnet.MPNet, prefix="mpnet.", dropped=HEADS
    ),
    "modernbert": Architecture(
        modernbert.ModernBertConfig.from_dict,
        modernbert.shapes,
        modernbert.ModernBert,
        prefix="model.",
        dropped=("head.", "decoder."),
    ),
    "nomic_bert": Architecture(
        nomicbert.NomicBertConfig.from_dict,
        nomicbert.shapes,
        nomicbert.NomicBert,
        prefix="nomic_bert.",
        dropped=HEADS,
    ),
}


# Everything else. `config` raises UnsupportedModel for what transformers does not know either.
GENERAL = Architecture(
    general.GeneralConfig,
    lambda config: config.shapes,
    general.General,
    prefix="",
    dropped=(*HEADS, "decoder.", "classifier.", "score."),
)


def architecture(name: str) -> Architecture:
    """The network of that name: with a file here, or through transformers."""
    return ARCHITECTURES.get(name, GENERAL)
