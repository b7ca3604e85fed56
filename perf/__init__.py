# SPDX-License-Identifier: Apache-2.0
"""Measures Arrowhead on this machine: `python -m perf` (perf/README.md)."""
