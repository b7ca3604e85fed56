# SPDX-License-Identifier: Apache-2.0
"""`python -m perf.peers`."""

from perf.peers.run import main

main()
