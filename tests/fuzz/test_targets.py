# SPDX-License-Identifier: Apache-2.0
"""Each target of `make fuzz`, a little of it and always the same; what was a fault once, first."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

from perf.fuzz.targets import TARGETS

# Inputs; those that a running server gets are fewer, for each is several requests.
_INPUTS = {True: 150, False: 60}
_SLOW = {"client: a hostile server": 20}  # each takes up to a second


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_no_fault(name: str, minilm_repository: Path) -> None:
    target = TARGETS[name]
    inputs = _SLOW.get(name, _INPUTS[target.guided])
    with target.opened(minilm_repository) as check:
        test = given(target.inputs)(check)
        for value in target.found:
            test = example(value)(test)
        settings(
            max_examples=inputs,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(test)()
