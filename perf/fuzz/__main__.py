# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.fuzz`."""

from perf.fuzz.run import main

main()
