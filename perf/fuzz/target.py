# SPDX-License-Identifier: Apache-2.0
"""What a target is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

Check = Callable[[Any], None]
Opened = Callable[[Path], AbstractContextManager[Check]]


@dataclass(frozen=True)
class Target:
    """One thing that is given hostile input.

    Attributes:
        name: in words, unique.
        wanted: what holds for every input, in a sentence.
        inputs: makes inputs.
        opened: given a model repository with MiniLM, gives the check of one input, which raises
            whatever is a fault. Inputs may be shared: a check changes none.
        found: inputs that were faults once.
        guided: whether the code runs in this process, so that its coverage can be followed.
    """

    name: str
    wanted: str
    inputs: SearchStrategy[Any]
    opened: Opened
    found: tuple[Any, ...] = ()
    guided: bool = True


def plain(check: Check) -> Opened:
    """`Target.opened` of a check that needs nothing."""

    @contextmanager
    def opened(repository: Path) -> Iterator[Check]:
        yield check

    return opened
