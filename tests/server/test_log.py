# SPDX-License-Identifier: Apache-2.0
import logging
from typing import Any

import pytest

from arrowhead_server.log import Log, is_for_operators, read

STAMP = "1124 06:21:26.034940 7587"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                f'E{STAMP} server.cc:241] "CudaDriverHelper has not been initialized."',
                f"E{STAMP} model_lifecycle.cc:642] \"failed to load 'toy_encoder' version 1: "
                'Internal: RuntimeError: no weights here\\n\\nAt:\\n  /x/model.py(1): <module>\\n"',
                f"E{STAMP} model_repository_manager.cc:703] \"Invalid argument: ensemble 'toy' "
                "depends on 'toy_encoder' which has no loaded version.\"",
                "error: creating server: Internal - failed to load all models",
            ],
            "model 'toy_encoder' failed to load: RuntimeError: no weights here",
        ),
        (
            [
                f"E{STAMP} model_lifecycle.cc:642] \"failed to load 'toy' version 1: "
                'Invalid argument: unexpected output"',
            ],
            "model 'toy' failed to load: unexpected output",
        ),
        (
            [
                "[libprotobuf ERROR text_format.cc:337] Error parsing text-format "
                'inference.ModelConfig: 5:51: Unknown enumeration value of "TYPE_FOO".',
                f'E{STAMP} model_repository_manager.cc:1460] "Poll failed for model directory '
                "'toy_encoder': failed to read text proto from /x/toy_encoder/config.pbtxt\"",
            ],
            "a config.pbtxt cannot be read, line:column 5:51: Unknown enumeration value of "
            '"TYPE_FOO".',
        ),
        (
            [
                f'E{STAMP} main.cc:245] "failed to start GRPC service: Unavailable - Socket '
                "'127.0.0.1:18001' already in use \"",
            ],
            "the GRPC endpoint cannot start: Socket '127.0.0.1:18001' already in use",
        ),
        (
            ["error: creating server: Internal - failed to stat file /tmp/nothere"],
            "failed to stat file /tmp/nothere",
        ),
        (["Error: Failed to initialize NVML"], None),
    ],
)
def test_the_cause_is_the_line_nearest_to_it(lines: list[str], cause: str | None) -> None:
    log = Log()
    for line in lines:
        log.add(line)
    assert log.cause() == cause


def test_only_a_model_that_cannot_load_is_fatal_at_once() -> None:
    log = Log()
    log.add(f'W{STAMP} metrics.cc:798] "DCGM unable to start: DCGM initialization error"')
    assert not log.is_fatal
    log.add(f"E{STAMP} model_lifecycle.cc:642] \"failed to load 'toy' version 1: Internal: no\"")
    assert log.is_fatal


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f'E{STAMP} python_be.cc:1] "Stub process is not healthy."', True),
        (f'W{STAMP} pinned_memory_manager.cc:170] "falling back"', False),
        (f"I{STAMP} pb_stub.cc:2145]  Non-graceful termination detected. ", False),
        ("a model prints this", True),
        ("  ", False),
    ],
)
def test_operators_see_errors_and_what_models_print(line: str, shown: bool) -> None:
    assert is_for_operators(line) is shown


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            f'E{STAMP} python_be.cc:1] "Stub process is not healthy."',
            ("triton", logging.ERROR, '"Stub process is not healthy."', {"file": "python_be.cc:1"}),
        ),
        (
            '{"part": "toy_encoder", "level": "info", "message": "batch", "texts": 2}',
            ("toy_encoder", logging.INFO, "batch", {"texts": 2}),
        ),
        (
            '{"part": "toy_encoder", "level": "warning", "message": "refused 1"}',
            ("toy_encoder", logging.WARNING, "refused 1", {}),
        ),
        ("a model prints this", ("triton", logging.WARNING, "a model prints this", {})),
        ('{"part": "torn', ("triton", logging.WARNING, '{"part": "torn', {})),
        ('{"part": "a"}', ("triton", logging.WARNING, '{"part": "a"}', {})),
    ],
)
def test_a_line_is_taken_apart(line: str, told: tuple[Any, ...]) -> None:
    assert read(line) == told
