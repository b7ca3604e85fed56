# SPDX-License-Identifier: Apache-2.0
"""What our encoder is measured in: the one place that everything in perf/ reads it from."""

# As `compute_dtype` in the encoder's config.pbtxt names them.
COMPUTED_IN = ("float32", "bfloat16", "int8")
