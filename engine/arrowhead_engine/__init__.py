# SPDX-License-Identifier: Apache-2.0
"""The inference engine: a Parquet weight file in, embeddings out. Knows no Triton and no network.

Start reading at `encoder.py` (ids -> embeddings), then `bert.py` (the network) and `weightfile.py`
(docs/format.md in code). Imports nothing of ours.

This module imports nothing on purpose: the tokenizer's process uses `arrowhead_engine.tokenizer`
and must not pay a second and 230 MB for torch.
"""
