# SPDX-License-Identifier: Apache-2.0
"""All targets, by name."""

from __future__ import annotations

from perf.fuzz.answers import GRPC, HTTP
from perf.fuzz.bodies import BODIES
from perf.fuzz.embedding import ENCODER, TOKENIZER
from perf.fuzz.lines import LINES
from perf.fuzz.served import GATEWAY, TRITON_GRPC, TRITON_HTTP
from perf.fuzz.target import Target
from perf.fuzz.weights import DESCRIPTION, FILE, FOOTER

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(FILE, FOOTER, DESCRIPTION, TOKENIZER, ENCODER, HTTP, GRPC, LINES),
        *(BODIES, GATEWAY, TRITON_HTTP, TRITON_GRPC),
    )
}
