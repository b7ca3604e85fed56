# SPDX-License-Identifier: Apache-2.0
"""An engine without a server, told what to do: `python -m perf.peers.worker ENGINE VARIANT FOLDER`.

One line of JSON in, one out: {"time": texts, "ms": 80} -> milliseconds of each call, as many as
fill so much time; {"embed": texts} -> the vectors, float32 in base64. It ends with its input.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from perf.peers.engines import Encoder, open_encoder


def answer(encoder: Encoder, order: dict[str, Any]) -> dict[str, Any]:
    """Does one order."""
    if "embed" in order:
        vectors = encoder.encode(order["embed"])
        return {"vectors": base64.b64encode(vectors.tobytes()).decode()}
    taken: list[float] = []
    while not taken or sum(taken) < order["ms"]:
        began = time.perf_counter()
        encoder.encode(order["time"])
        taken.append((time.perf_counter() - began) * 1e3)
    return {"ms": taken}


def main() -> None:
    """Loads the engine, says so, and serves orders."""
    engine, variant, folder = sys.argv[1:]
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    encoder = open_encoder(engine, variant, Path(folder))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(encoder, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
