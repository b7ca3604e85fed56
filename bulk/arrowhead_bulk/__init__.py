# SPDX-License-Identifier: Apache-2.0
"""Embeds corpora that are larger than one machine: `arrowhead bulk embed`.

    corpus ──▶ units ──▶ parts in OUT.staging ──▶ verified, published ──▶ OUT
    corpus.py  reading.py, vectors.py, work.py    job.py

A corpus is cut into units, each some thousand neighbouring rows, whose limits depend on nothing but
the corpus. A unit becomes one file, always of the same name and content, which is there whole or
not at all. So a unit may be done twice, by whomever, and nothing is there twice; and to resume is
to go through all units again and to pass over those whose files are sound.

Who goes through them is another matter: one process (`run_here`), or actors on a Ray cluster
(on_ray.py). Both call `work.Worker`.

Imports the client and the engine. Start reading at `job.py`.
"""
