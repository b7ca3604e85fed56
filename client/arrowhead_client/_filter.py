# SPDX-License-Identifier: Apache-2.0
"""What a filter may call: functions whose results are no longer than what they are given.

A filter comes from anybody who may search, a language model too: `repeat('a', 1000000000)` in one
would take the process's memory. The rest of it, LanceDB checks.
"""

from __future__ import annotations

import re

from arrowhead_client._errors import InvalidInput

FUNCTIONS = frozenset(
    {
        "abs",
        "array_contains",
        "array_has",
        "array_has_all",
        "array_has_any",
        "array_length",
        "btrim",
        "ceil",
        "char_length",
        "character_length",
        "coalesce",
        "contains",
        "current_date",
        "date",
        "date_part",
        "date_trunc",
        "ends_with",
        "extract",
        "floor",
        "length",
        "list_contains",
        "list_has",
        "lower",
        "ltrim",
        "now",
        "nullif",
        "octet_length",
        "regexp_like",
        "round",
        "rtrim",
        "starts_with",
        "strpos",
        "substr",
        "substring",
        "trim",
        "upper",
    }
)
# What else stands before a bracket: words of SQL, and types of a length.
_WORDS = frozenset(
    {
        "and",
        "any",
        "as",
        "between",
        "by",
        "case",
        "cast",
        "decimal",
        "else",
        "from",
        "in",
        "is",
        "like",
        "ilike",
        "not",
        "numeric",
        "or",
        "then",
        "timestamp",
        "try_cast",
        "values",
        "when",
    }
)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_CALLED = re.compile(r"([\w`]+)\s*\(")


def check_filter(where: str) -> None:
    """Refuses what calls other functions, or hides what it calls.

    Raises:
        InvalidInput: names the function.
    """
    bare = _QUOTED.sub("``", where)
    for sign in ("--", "/*", "$"):
        if sign in bare:
            raise InvalidInput(
                f"the filter {where[:200]!r} has {sign} outside of a string: wanted a condition "
                "without comments, such as: year > 2020 AND source = 'a'"
            )
    for name in _CALLED.findall(bare):
        if name.lower() not in FUNCTIONS | _WORDS:
            raise InvalidInput(
                f"the filter {where[:200]!r} calls {name[:80]!r}: wanted one of "
                f"{', '.join(sorted(FUNCTIONS))}"
            )
