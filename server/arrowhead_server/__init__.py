# SPDX-License-Identifier: Apache-2.0
"""Starts and supervises Triton. May import `arrowhead_client`, never the engine or torch.

Read `supervisor.py` first: a `Server` runs one `TritonProcess` after another (`process.py`) and
keeps a `Pulse` on it (`probe.py`). `triton.py` says which Triton and with which flags,
`repository.py` what is to be served. `command.py` is a `Server` with signals and printing.
"""
