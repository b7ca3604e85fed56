# SPDX-License-Identifier: Apache-2.0
"""The count of operations that the engine's rates are made from."""

from arrowhead_engine.spec import ModelSpec
from perf.engine import flop_per_text


def test_minilm_costs_21_mflop_a_token():
    config = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    spec = ModelSpec("bert", config, "mean", True, 256, 384)
    linears = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert flop_per_text(spec, 1) == linears + 2 * 6 * 2 * 384
    assert 21e6 < flop_per_text(spec, 16) / 16 < 22e6
