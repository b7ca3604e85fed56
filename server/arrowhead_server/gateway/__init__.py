# SPDX-License-Identifier: Apache-2.0
"""The gateway: JSON over HTTP in front of Triton, in the dialects that people's tools speak.

    app.py       the FastAPI application: all dialects, health, metrics, a limit on requests
    tei.py       `/embed`, `/similarity`, `/info`, as HuggingFace's server (TEI) has them
    openai.py    `/v1/embeddings`, `/v1/models`, as OpenAI has them
    triton.py    `/v2/models/NAME/infer`, as Triton has it
    page.py      the page at `/`, out of the folder page/
    web.py       what routes of each get and give: the model, and JSON
    asking.py    what all dialects ask for, and the edge algebra that gives it
    embedder.py  texts to vectors: remembered, and asked for once however many ask
    failures.py  our errors as statuses and bodies, a dialect each
    command.py   `arrowhead gateway`

It loads no model: everything it tells of one it asks Triton for.
"""
