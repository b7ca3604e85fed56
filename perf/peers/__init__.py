# SPDX-License-Identifier: Apache-2.0
"""Other ways to serve the same model, built and measured beside ours: `python -m perf.peers`.

    environments    one virtual environment a family, from pins; the files that engines want
    engine_*        one engine each: texts -> vectors. Run in the peers' environments
    batching, app   the FastAPI server around an engine
    worker          an engine without a server, timed in turns (inprocess)
    roads           how a server is asked: HTTP, Triton's HTTP, gRPC
    generator       clients in a closed loop, the same for all servers
    servers         which servers there are, how each starts and stops
    run             the command; results, report, plots: what it writes

`app`, `batching`, `padding`, `engines`, `engine_*`, `worker`, `export` and `quantize` run in the
peers' environments, so they import nothing of Arrowhead's (but `engine_arrowhead`, in ours).
"""
