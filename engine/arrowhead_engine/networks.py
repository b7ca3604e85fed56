# SPDX-License-Identifier: Apache-2.0
"""The networks that are written in torch alone, by HuggingFace's `model_type`."""

from __future__ import annotations

from arrowhead_engine import general, modernbert, nomicbert
from arrowhead_engine.architectures import HEADS, Architecture

ON_TORCH = {
    "modernbert": Architecture(
        modernbert.ModernBertConfig.from_dict,
        modernbert.shapes,
        prefix="model.",
        dropped=("head.", "decoder."),
        network=modernbert.ModernBert,
    ),
    "nomic_bert": Architecture(
        nomicbert.NomicBertConfig.from_dict,
        nomicbert.shapes,
        prefix="nomic_bert.",
        dropped=HEADS,
        network=nomicbert.NomicBert,
    ),
}
# Everything else. `config` raises UnsupportedModel for what transformers does not know either.
GENERAL = Architecture(
    general.GeneralConfig,
    lambda config: config.shapes,
    prefix="",
    dropped=(*HEADS, "decoder.", "classifier.", "score."),
    network=general.General,
)
