# SPDX-License-Identifier: Apache-2.0
"""The gateway: JSON over HTTP in front of Triton, in the dialects that people's tools speak.

    command.py   `arrowhead gateway`, `arrowhead gateway-key`
    settings.py  what a gateway is told
    draining.py  uvicorn's server, with an end that balancers hear of before it comes
    protocol.py  uvicorn's HTTP, with an end to headers
    gate.py      what each request passes first: who asks, how often, how many at once, how large
    access.py      who asks: by keys.py (hashed API keys), by tokens.py (JWT), or an address
    rates.py       how often: in memory, or in a Redis that several gateways share
    bodies.py      how large, and how much memory that will take
    reread.py    files that are read again when they change
    app.py       the FastAPI application: all dialects, health, metrics, the gate
    tei.py       `/embed`, `/similarity`, `/info`, as HuggingFace's server (TEI) has them
    openai.py    `/v1/embeddings`, `/v1/models`, as OpenAI has them
    triton.py    `/v2/models/NAME/infer`, as Triton has it
    page.py      the page at `/`, out of the folder page/
    web.py       what routes of each get and give: the model, and JSON
    asking.py    what all dialects ask for, and the edge algebra that gives it
    embedder.py  texts to vectors: remembered, and asked for once however many ask
    failures.py  our errors as statuses and bodies, a dialect each
    metrics.py   what Prometheus reads
    call.py      what is known of a request while it is under way: its id, its caller
    spans.py     what OpenTelemetry is told

It loads no model: everything it tells of one it asks Triton for.
"""
