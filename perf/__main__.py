# SPDX-License-Identifier: Apache-2.0
"""`python -m perf`."""

from perf.run import main

main()
