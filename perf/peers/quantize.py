# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's dynamic int8 of an ONNX file: `... quantize FILE tensor|channel TO`.

Weights are int8 with one scale a tensor or a channel; activations are scaled as they come.
"""

from __future__ import annotations

import sys

from onnxruntime.quantization import QuantType, quantize_dynamic


def main() -> None:
    """Writes the file."""
    file, scale, to = sys.argv[1:]
    quantize_dynamic(file, to, per_channel=scale == "channel", weight_type=QuantType.QInt8)


if __name__ == "__main__":
    main()
