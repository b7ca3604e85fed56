# SPDX-License-Identifier: Apache-2.0
"""HuggingFace and sentence-transformers models -> Triton model repository entries.

Start reading at `convert.py`, which is the order of the steps. May import the engine only.
"""
