# SPDX-License-Identifier: Apache-2.0
"""What routes of either dialect get and give: the model, and JSON."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import Depends, Request, Response

from arrowhead_server.gateway.asking import Asking


def asking(request: Request) -> Asking:
    """The model behind this gateway."""
    found: Asking = request.app.state.asking
    return found


Model = Annotated[Asking, Depends(asking)]


def json(content: Any, status: int = 200) -> Response:
    """A response; arrays as lists of the shortest numbers that read back as the same float32."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json")
