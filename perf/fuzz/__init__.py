# SPDX-License-Identifier: Apache-2.0
"""Hostile input for every part that reads what strangers send: `python -m perf.fuzz`.

    json_edits     sound JSON, spoilt
    weights        the weight file's reader, and the model's description in it
    embedding      the tokenizer, and the encoder down to its kernels
    answers        what a hostile server answers the client: HTTP and gRPC
    lines          the same on a real connection, byte by byte
    served         a real Triton and a real gateway, asked over HTTP and gRPC
    targets        all of them by name
    worker         one target, in a process of its own: by atheris where there is coverage to follow
    run, page      the command; all targets in turn, the findings, and the page

A target is a Hypothesis strategy and a check of one input. The tests run each a little
(tests/fuzz), this command for minutes.
"""
