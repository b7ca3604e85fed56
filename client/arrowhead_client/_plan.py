# SPDX-License-Identifier: Apache-2.0
"""What a call is, whichever way it travels: the part that `Client` and `AsyncClient` share.

    texts ── encode_texts ─▶ UTF-8 ── split ─▶ Requests ── (transport) ─▶ answers ── Rows ─▶ array

Nothing here waits or touches the network. N texts of a call, B texts of a request, D the width.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from arrowhead_client._algebra import Vectors, in_candidate, normalize, truncate_dimensions
from arrowhead_client._errors import (
    InvalidInput,
    ModelNotFound,
    ServerError,
    Unavailable,
    UnexpectedResponse,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from tqdm import tqdm

MAX_BATCH_SIZE = 100  # the served model's max_batch_size: Triton refuses more
CANDIDATE = "_candidate"  # what follows a model's name where its next version is on trial
BAR_FROM_REQUESTS = 8  # below this a progress bar is noise

FIRST_DELAY_S, LAST_DELAY_S, JITTER = 0.1, 2.0, 0.25
# 0.1 + 0.2 + 0.4 + 0.8 + 1.6 + 3 * 2.0 = 9.1 s, 6.8 s at the least: a server that restarts in about
# 5 s is survived.
DEFAULT_RETRIES = 8

Answer: TypeAlias = Mapping[str, npt.NDArray[Any]]
Edge: TypeAlias = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Request:
    """One inference request: B texts to one model.

    Attributes:
        model: the model's name on the server.
        texts: B texts, UTF-8; they become the input `text` BYTES [B, 1].
        outputs: the names of the outputs wanted.
    """

    model: str
    texts: tuple[bytes, ...]
    outputs: tuple[str, ...]


class TokenCounts(NamedTuple):
    """What the tokenizer says of N texts.

    Attributes:
        length: int32 [N], tokens the model reads of each text, special tokens included.
        truncated: bool [N], whether the text was longer than the model reads.
    """

    length: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Experiment:
    """A trial of a model's next version, which the server serves beside it as `<name>_candidate`.

    A client is in one arm for as long as it lives, and clients with the same key and share are in
    the same: vectors of two versions are not comparable, so the unit is the caller, not the text.

    Attributes:
        share: the candidate's part of all callers, 0..1.
        key: names one caller, such as an agent or a user; see `in_candidate`.

    Raises:
        InvalidInput: `share` or `key` is out of its range.
    """

    share: float
    key: str

    def __post_init__(self) -> None:
        in_candidate(self.key, self.share)

    def model(self, live: str) -> str:
        """The name of the model of the caller's arm, given the live one's."""
        return f"{live}{CANDIDATE}" if in_candidate(self.key, self.share) else live


@dataclass(frozen=True)
class Settings:
    """How a client calls; checked once, when the client is made.

    Attributes:
        live: the model's name on the server.
        timeout_s: seconds from a request's first sending to its answer, retries included.
        retries: how often a request that met nobody is sent again.
        concurrency: requests in flight at once.
        batch_size: texts in one request.
        experiment: chooses between the model and its candidate; None: the model.

    Raises:
        InvalidInput: a setting is out of its range.
    """

    live: str
    timeout_s: float
    retries: int
    concurrency: int
    batch_size: int
    experiment: Experiment | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("retries", 0, None),
            ("concurrency", 1, None),
            ("batch_size", 1, MAX_BATCH_SIZE),
        ):
            _check_whole(name, getattr(self, name), low, high)
        if not isinstance(self.live, str) or not self.live:
            raise InvalidInput(f"model={self.live!r}: wanted the name of a served model")
        if not self.timeout_s > 0:
            raise InvalidInput(f"timeout_s={self.timeout_s!r}: wanted seconds above 0")
        if not isinstance(self.experiment, (Experiment, type(None))):
            raise InvalidInput(f"experiment={self.experiment!r}: wanted Experiment(share, key)")

    @property
    def model(self) -> str:
        """The name of the model that is asked: the live one, or its candidate."""
        return self.experiment.model(self.live) if self.experiment else self.live

    def told(self, error: ServerError) -> ServerError:
        """The error; of a candidate that is not served, one that says so."""
        if self.experiment is None or self.model == self.live:
            return error
        if not isinstance(error, ModelNotFound):
            return error
        return ModelNotFound(
            f"this client is in the candidate's arm ({self.experiment}), but {self.model!r} is not "
            f"served: serve it, or end the experiment here with experiment=None. {error}",
            status=error.status,
        )

    def embed_requests(self, texts: Sequence[bytes]) -> list[Request]:
        """The requests that embed these texts."""
        return self._split(self.model, texts, ("embeddings",))

    def token_requests(self, texts: Sequence[bytes]) -> list[Request]:
        """The requests that count the tokens of these texts.

        In both arms they go to the tokenizer that the model shares with its candidate, of which
        Triton asks the newest version that is loaded.
        """
        return self._split(f"{self.live}_tokenizer", texts, ("length", "truncated"))

    def attempts(self) -> Attempts:
        """A fresh retry budget, for one request."""
        return Attempts(self.timeout_s, self.retries)

    def _split(self, model: str, texts: Sequence[bytes], outputs: tuple[str, ...]) -> list[Request]:
        return [
            Request(model, tuple(texts[start : start + self.batch_size]), outputs)
            for start in range(0, len(texts), self.batch_size)
        ]


class Attempts:
    """The retry budget of one request: at most `retries` more tries, all within `timeout_s`."""

    def __init__(self, timeout_s: float, retries: int) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._delays = delays(retries)
        self._made = 1

    def remaining_s(self) -> float:
        """Seconds left for the next try, above 0."""
        return max(self._deadline - time.monotonic(), 1e-3)

    def delay_after(self, error: Unavailable) -> float:
        """Seconds to wait before the next try.

        Raises:
            Unavailable: no try or no time is left.
        """
        delay = next(self._delays, None)
        if delay is None or delay >= self.remaining_s():
            if self._made == 1:
                raise error
            raise Unavailable(f"{error} Tried {self._made} times.", status=error.status) from error
        self._made += 1
        return delay


def delays(retries: int) -> Iterator[float]:
    """Seconds to wait before each retry: doubling from 0.1 to 2.0, each up to 25 % more or less.

    The jitter keeps clients that lost the same server from coming back in step.
    """
    for retry in range(retries):
        spread = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret hangs on it)
        yield min(FIRST_DELAY_S * 2.0 ** min(retry, 30), LAST_DELAY_S) * spread


def encode_texts(texts: str | Sequence[str], prompt: str | None = None) -> list[bytes]:
    """The texts as UTF-8, each with the prompt in front; a single string is one text.

    Raises:
        InvalidInput: something that is not a string, or a string that has no UTF-8; says which.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidInput(f"prompt is {type(prompt).__name__}: wanted str or None")
    if isinstance(texts, str):
        texts = [texts]
    elif isinstance(texts, (bytes, bytearray, Mapping)) or not hasattr(texts, "__iter__"):
        raise InvalidInput(f"texts is {type(texts).__name__}: wanted str or a sequence of str")
    encoded = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInput(f"texts[{index}] is {type(text).__name__}: wanted str")
        try:
            encoded.append((f"{prompt}{text}" if prompt else text).encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"texts[{index}] (prompt in front) has a lone surrogate at index {error.start}, "
                f"{error.object[error.start]!r}, which has no UTF-8. Decode its bytes again, with "
                "errors='replace' if they are broken."
            ) from error
    return encoded


def check_prompts(prompt: str | None, prompt_name: str | None) -> None:
    """Refuses a prompt's text together with a name, before anything is sent.

    Raises:
        InvalidInput: both are given, or the name is no string.
    """
    if prompt_name is None:
        return
    if not isinstance(prompt_name, str):
        raise InvalidInput(f"prompt_name is {type(prompt_name).__name__}: wanted str or None")
    if prompt is not None:
        raise InvalidInput(f"prompt={prompt!r} and prompt_name={prompt_name!r}: give one of them")


def prompt_named(name: str, known: Mapping[str, str], model: str) -> str:
    """The prompt of this name.

    Raises:
        InvalidInput: the model has no such prompt; lists those it has.
    """
    if name not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise InvalidInput(
            f"prompt_name={name!r}: model {model!r} knows {names}. prompt='...' takes any text."
        )
    return known[name]


class Rows:
    """Puts answers into their rows, in whatever order they come.

    One array is made when the first answer tells its width; each answer is copied into its rows.

    Args:
        requests: all requests of the call, in the order of the texts.
        output: the name of the output to gather, [B, D] of each answer.
        edge: what is done to an answer's rows before they are kept, such as `vector_edge(...)`.
    """

    def __init__(self, requests: Sequence[Request], output: str, edge: Edge) -> None:
        self._requests = requests
        self._output = output
        self._edge = edge
        self._starts = [0, *accumulate(len(request.texts) for request in requests)]
        self._array: npt.NDArray[Any] | None = None

    def put(self, index: int, answer: Answer) -> None:
        """Takes the answer to `requests[index]`.

        Raises:
            UnexpectedResponse: the output is missing, or its shape is not the contract's.
            InvalidInput: the edge cannot be applied to vectors of this width.
        """
        request = self._requests[index]
        rows = answer.get(self._output)
        if rows is None or rows.ndim != 2 or len(rows) != len(request.texts):
            met = "nothing" if rows is None else str(list(rows.shape))
            raise UnexpectedResponse(
                f"model {request.model!r} answered with {met} as {self._output!r}: wanted "
                f"[{len(request.texts)}, D]. Is it a model that `arrowhead convert` made?"
            )
        rows = self._edge(rows)
        if self._array is None:
            self._array = np.empty((self._starts[-1], rows.shape[1]), rows.dtype)
        if rows.shape[1] != self._array.shape[1]:
            raise UnexpectedResponse(
                f"model {request.model!r} answered with rows of {rows.shape[1]} and of "
                f"{self._array.shape[1]}. Was it exchanged for another meanwhile?"
            )
        self._array[self._starts[index] : self._starts[index + 1]] = rows

    def gathered(self, width_of_none: int = 1) -> npt.NDArray[Any]:
        """The rows of all answers, [N, D], in the order of the texts; of no texts `[0, width]`."""
        if self._array is None:
            return self._edge(np.empty((0, width_of_none), np.float32))
        return self._array


class TokenRows:
    """`Rows` for the two outputs of the tokenizer."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._length = Rows(requests, "length", partial(np.asarray, dtype=np.int32))
        self._truncated = Rows(requests, "truncated", partial(np.asarray, dtype=np.bool_))

    def put(self, index: int, answer: Answer) -> None:
        """Takes the answer to `requests[index]`; raises as `Rows.put` does."""
        self._length.put(index, answer)
        self._truncated.put(index, answer)

    def gathered(self) -> TokenCounts:
        """The counts of all texts, in their order."""
        return TokenCounts(self._length.gathered()[:, 0], self._truncated.gathered()[:, 0])


def vector_edge(dimensions: int | None, unit_length: bool) -> Edge:
    """What a call wants done to its vectors: cut, normalised, or only made float32."""
    if dimensions is not None:
        _check_whole("dimensions", dimensions, 1, None)
        return partial(truncate_dimensions, dimensions=dimensions)
    return normalize if unit_length else partial(np.asarray, dtype=np.float32)


def to_arrow(vectors: Vectors) -> pa.FixedSizeListArray:
    """[N, D] vectors as N fixed-size lists of D floats, over the same memory."""
    import pyarrow as pa  # heavy, and few calls want it

    count, width = vectors.shape
    values = pa.Array.from_buffers(pa.float32(), count * width, [None, pa.py_buffer(vectors)])
    return pa.FixedSizeListArray.from_arrays(values, width)


def progress_bar(
    texts: Sequence[bytes], requests: Sequence[Request], progress: bool | None
) -> tqdm[Any]:
    """A bar over texts on stderr. `progress=None` shows it on a terminal, for a long call only."""
    from tqdm import tqdm

    shown = (
        sys.stderr.isatty() and len(requests) >= BAR_FROM_REQUESTS if progress is None else progress
    )
    return tqdm(total=len(texts), unit="text", disable=not shown, leave=progress is True)


def _check_whole(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidInput(f"{name}={value!r}: wanted a whole number")
    if value < low or (high is not None and value > high):
        raise InvalidInput(f"{name}={value}: wanted {low}.." + ("" if high is None else str(high)))
