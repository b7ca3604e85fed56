# SPDX-License-Identifier: Apache-2.0
"""How `arrowhead bulk embed` writes vectors: the names that its writer and its readers share."""

from __future__ import annotations

import json
from typing import Any

EMBEDDING, TOKENS, TRUNCATED = "embedding", "tokens", "truncated"  # columns
JOB, SUCCESS = "_job.json", "_SUCCESS"  # files: whose folder it is, and that it is whole
METADATA = b"arrowhead"  # of a file's schema: JSON


def told(schema: Any) -> dict[str, Any]:
    """What a part's schema says of its vectors.

    Raises:
        LookupError, TypeError, ValueError: it is no part's.
    """
    found: dict[str, Any] = json.loads(schema.metadata[METADATA])
    return found
