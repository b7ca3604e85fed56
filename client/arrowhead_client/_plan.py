# SPDX-License-Identifier: Apache-2.0
"""What a call is, whichever way it travels: the part that `Client` and `AsyncClient` share.

    texts ── encode_texts ─▶ UTF-8 ── split ─▶ Requests ── (transport) ─▶ answers ── Rows ─▶ array

Nothing here waits or touches the network. N texts of a call, B texts of a request, D the width.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from arrowhead_client._algebra import in_candidate
from arrowhead_client._arrow import is_arrow, pack_strings, to_strings
from arrowhead_client._errors import (
    InvalidInput,
    ModelNotFound,
    ServerError,
    Unavailable,
    UnexpectedResponse,
)
from arrowhead_client._info import Config, ModelInfo
from arrowhead_client._options import Edge, check_whole
from arrowhead_client._texts import PackedTexts, packed
from arrowhead_client._tracing import span_headers

if TYPE_CHECKING:
    import pyarrow as pa
    from tqdm import tqdm

MAX_BATCH_SIZE = 100  # the served model's max_batch_size: Triton refuses more
CANDIDATE = "_candidate"  # what follows a model's name where its next version is on trial
TOKEN_OUTPUTS = ("input_ids", "length", "truncated", "tokens", "offsets")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
BAR_FROM_REQUESTS = 8  # below this a progress bar is noise

FIRST_DELAY_S, LAST_DELAY_S, JITTER = 0.1, 2.0, 0.25
# 0.1 + 0.2 + 0.4 + 0.8 + 1.6 + 3 * 2.0 = 9.1 s, 6.8 s at the least: a server that restarts in about
# 5 s is survived.
DEFAULT_RETRIES = 8

T = TypeVar("T")
Answer: TypeAlias = Mapping[str, npt.NDArray[Any]]
Texts: TypeAlias = "str | Sequence[str] | pa.Array | pa.ChunkedArray"


class Tensor(NamedTuple):
    """An input, as it is sent.

    Attributes:
        kind: Triton's name of its type.
        content: its elements in the order of the rows; of BYTES, each with its length in front.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    content: bytes


@dataclass(frozen=True)
class Request:
    """One inference request: B texts, or the token ids of B texts, to one model.

    Attributes:
        model: the model's name on the server.
        texts: B texts, UTF-8; they become the input `text` BYTES [B, 1].
        outputs: the names of the outputs wanted.
        ids: in place of texts, the ids of B texts; they become the inputs `input_ids` INT32 [B, S]
            and `length` INT32 [B, 1].
        version: of the model; 0 is the one that the server chooses.
        id: what logs on its way call it; none if empty.
        headers: what else goes along: HTTP's headers, or gRPC's metadata.
    """

    model: str
    texts: Sequence[bytes]
    outputs: tuple[str, ...]
    ids: tuple[npt.NDArray[np.int32], ...] = ()
    version: int = 0
    id: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """B."""
        return len(self.texts) or len(self.ids)

    def inputs(self) -> list[Tensor]:
        """What is sent."""
        if not self.ids:
            return [Tensor("text", "BYTES", (len(self.texts), 1), packed(self.texts))]
        length = np.array([len(row) for row in self.ids], "<i4")
        input_ids = np.zeros((len(self.ids), int(length.max())), "<i4")
        for row, values in zip(input_ids, self.ids, strict=True):
            row[: len(values)] = values
        return [
            Tensor("input_ids", "INT32", input_ids.shape, input_ids.tobytes()),
            Tensor("length", "INT32", (len(length), 1), length.tobytes()),
        ]


class Token(NamedTuple):
    """One token of a text.

    Attributes:
        id: the model's.
        text: what of the text it stands for; of special tokens, their name.
        special: whether it is not of the text: put there by the tokenizer.
        start, stop: which characters of the text (the prompt in front counts); None if special.
    """

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Tokenized(NamedTuple):
    """What the model reads of a text.

    Attributes:
        tokens: in order.
        truncated: whether the text has more.
    """

    tokens: list[Token]
    truncated: bool


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
            check_whole(name, getattr(self, name), low, high)
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

    def tokenize_requests(self, texts: Sequence[bytes]) -> list[Request]:
        """The requests that tell the tokens of these texts, of the same model."""
        return self._split(f"{self.live}_tokenizer", texts, TOKEN_OUTPUTS)

    def id_requests(
        self, ids: Sequence[npt.NDArray[np.int32]], served: Config | ModelInfo
    ) -> list[Request]:
        """The requests that embed texts by their ids: of the encoder, past the ensemble.

        Raises:
            InvalidInput: the model is none that has an encoder of its own.
        """
        if not served.version:
            raise InvalidInput(f"model {self.model!r} takes no token ids: it names no encoder")
        return [
            Request(
                f"{served.parts}_encoder", (), ("embeddings",), tuple(some), version=served.version
            )
            for some in _parts(ids, self.batch_size)
        ]

    def told_request(self, served: Config | ModelInfo, outputs: tuple[str, ...]) -> Request:
        """The request that asks the model's tokenizer what it is.

        Raises:
            InvalidInput: the model is none that has a tokenizer of its own.
        """
        if not served.version:
            raise InvalidInput(f"model {self.model!r} is no model of ours")
        return Request(f"{served.parts}_tokenizer", (b"",), outputs, version=served.version)

    def attempts(self) -> Attempts:
        """A fresh retry budget, for one request."""
        return Attempts(self.timeout_s, self.retries)

    def _split(self, model: str, texts: Sequence[bytes], outputs: tuple[str, ...]) -> list[Request]:
        return [
            Request(model, some if isinstance(some, PackedTexts) else tuple(some), outputs)
            for some in _parts(texts, self.batch_size)
        ]


def is_request_id(value: object) -> bool:
    """Whether it may stand in logs: of 1 to 128 letters, digits and `._:-` it must be."""
    return isinstance(value, str) and _REQUEST_ID.fullmatch(value) is not None


def carrying(requests: list[Request], request_id: str | None) -> list[Request]:
    """The requests with an id, of which each has the same, and with what tells of the span.

    Raises:
        InvalidInput: the id is none.
    """
    headers = span_headers()
    if request_id is None and not headers:
        return requests
    # Several are sent as one where those who ask wait for the same.
    if request_id is not None and not all(map(is_request_id, request_id.split(","))):
        raise InvalidInput(
            f"request_id={request_id!r:.150}: wanted 1 to 128 letters, digits and . _ : -"
        )
    return [replace(one, id=request_id or "", headers=headers) for one in requests]


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


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
            told = f"{error} Tried {self._made} times."
            raise type(error)(told, status=error.status) from error
        self._made += 1
        return delay


def delays(retries: int) -> Iterator[float]:
    """Seconds to wait before each retry: doubling from 0.1 to 2.0, each up to 25 % more or less.

    The jitter keeps clients that lost the same server from coming back in step.
    """
    for retry in range(retries):
        spread = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 (no secret hangs on it)
        yield min(FIRST_DELAY_S * 2.0 ** min(retry, 30), LAST_DELAY_S) * spread


def encode_texts(texts: Texts, prompt: str | None = None) -> Sequence[bytes]:
    """The texts as UTF-8, each with the prompt in front; a single string is one text.

    Raises:
        InvalidInput: something that is not a string, or a string that has no UTF-8; says which.
    """
    if is_arrow(texts):
        return pack_strings(texts, encode_texts(prompt or "")[0])
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


def listed(texts: Texts) -> list[str]:
    """The texts one by one; a single string is one text."""
    if is_arrow(texts):
        return to_strings(texts)
    return [texts] if isinstance(texts, str) else list(texts)


def encode_ids(input_ids: Sequence[Sequence[int]]) -> list[npt.NDArray[np.int32]]:
    """The ids of each text, int32.

    Raises:
        InvalidInput: something that is no list of whole numbers of 32 bits; says which.
    """
    encoded = []
    for index, ids in enumerate(input_ids):
        try:
            row = np.asarray(ids)
        except ValueError:  # lists of unequal lengths
            row = np.empty(())
        if row.ndim != 1 or not len(row) or row.dtype.kind not in "iu":
            raise InvalidInput(f"input_ids[{index}] is {ids!r:.60}: wanted a list of token ids")
        if row.min() < 0 or row.max() > np.iinfo(np.int32).max:
            raise InvalidInput(f"input_ids[{index}] has ids out of range: wanted 0..2147483647")
        encoded.append(row.astype(np.int32))
    return encoded


_NUMBERS = {"f": "finite floating-point numbers", "i": "whole numbers", "b": "booleans"}


class Rows:
    """Puts answers into their rows, in whatever order they come.

    One array is made when the first answer tells its width; each answer is copied into its rows. A
    single answer is kept as it is.

    Args:
        requests: all requests of the call, in the order of the texts.
        output: the name of the output to gather, [B, D] of each answer.
        edge: what is done to an answer's rows before they are kept, such as `Options.edge()`.
        kind: numpy's letter for the numbers that it holds; "f": all of them finite.
    """

    def __init__(
        self, requests: Sequence[Request], output: str, edge: Edge, kind: str = "f"
    ) -> None:
        self._requests = requests
        self._output = output
        self._edge = edge
        self._kind = kind
        self._starts = [0, *accumulate(map(len, requests))]
        self._array: npt.NDArray[Any] | None = None

    def put(self, index: int, answer: Answer) -> None:
        """Takes the answer to `requests[index]`.

        Raises:
            UnexpectedResponse: the output is missing, or its shape is not the contract's.
            InvalidInput: the edge cannot be applied to vectors of this width.
        """
        request = self._requests[index]
        rows = answer.get(self._output)
        if rows is None or rows.ndim != 2 or len(rows) != len(request):
            met = "nothing" if rows is None else str(list(rows.shape))
            raise UnexpectedResponse(
                f"model {request.model!r} answered with {met} as {self._output!r}: wanted "
                f"[{len(request)}, D]. Is it a model that `arrowhead convert` made?"
            )
        if rows.dtype.kind != self._kind or (self._kind == "f" and not np.isfinite(rows).all()):
            raise UnexpectedResponse(
                f"model {request.model!r} answered with {self._output!r} of {rows.dtype}: wanted "
                f"{_NUMBERS[self._kind]}"
            )
        rows = self._edge(rows)
        if len(self._requests) == 1:
            self._array = rows
            return
        if self._array is None:
            self._array = np.empty((self._starts[-1], rows.shape[1]), rows.dtype)
        if rows.shape[1] != self._array.shape[1]:
            raise UnexpectedResponse(
                f"model {request.model!r} answered with rows of {rows.shape[1]} and of "
                f"{self._array.shape[1]}. Was it exchanged for another meanwhile?"
            )
        self._array[self._starts[index] : self._starts[index + 1]] = rows

    def gathered(self, width_of_none: int = 1) -> npt.NDArray[Any]:
        """The rows of all answers, [N, D], in the order of the texts; of no texts `[0, width]`.

        They may be read-only: then they lie over an answer's own bytes.
        """
        if self._array is None:
            return self._edge(np.empty((0, width_of_none), np.float32))
        return self._array


def writable(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The vectors as they are, or a copy if they are read-only, or not aligned."""
    return np.require(vectors, requirements=["W", "A"])


class TokenRows:
    """`Rows` for the two outputs of the tokenizer."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._length = Rows(requests, "length", partial(np.array, dtype=np.int32), "i")
        self._truncated = Rows(requests, "truncated", partial(np.array, dtype=np.bool_), "b")

    def put(self, index: int, answer: Answer) -> None:
        """Takes the answer to `requests[index]`; raises as `Rows.put` does."""
        self._length.put(index, answer)
        self._truncated.put(index, answer)
        length, truncated = answer["length"], answer["truncated"]
        if length.shape[1] != 1 or truncated.shape[1] != 1 or (length < 0).any():
            raise UnexpectedResponse(
                f"lengths {list(length.shape)} and truncated {list(truncated.shape)} that count no "
                "tokens: wanted [B, 1]"
            )

    def gathered(self) -> TokenCounts:
        """The counts of all texts, in their order."""
        return TokenCounts(self._length.gathered()[:, 0], self._truncated.gathered()[:, 0])


def tokens_of(request: Request, answer: Answer) -> list[Tokenized]:
    """The tokens of a request's texts.

    Raises:
        UnexpectedResponse: an output is missing, or they do not fit each other and the texts.
    """
    try:
        ids, length, truncated, tokens, offsets = (answer[name] for name in TOKEN_OUTPUTS)
    except KeyError as error:
        raise UnexpectedResponse(
            f"model {request.model!r} has no output {error}: convert it again"
        ) from error
    try:
        return list(_tokenized(request.texts, ids, length, truncated, tokens, offsets))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UnexpectedResponse(
            f"model {request.model!r} answered with tokens that do not fit the texts: {error}"
        ) from error


def _tokenized(
    texts: Sequence[bytes],
    ids: npt.NDArray[Any],
    length: npt.NDArray[Any],
    truncated: npt.NDArray[Any],
    tokens: npt.NDArray[Any],
    offsets: npt.NDArray[Any],
) -> Iterator[Tokenized]:
    for row, raw in enumerate(texts):
        text, count = raw.decode(), int(length[row, 0])
        if not 0 <= count <= min(ids.shape[1], tokens.shape[1], offsets.shape[1]):
            raise ValueError(f"text {row} has {count} tokens")
        yield Tokenized(
            [
                _token(text, int(ids[row, place]), tokens[row, place], *offsets[row, place])
                for place in range(count)
            ],
            bool(truncated[row, 0]),
        )


def _token(text: str, id_: int, name: str | bytes, start: Any, stop: Any) -> Token:
    start, stop = int(start), int(stop)
    if start < 0:
        return Token(id_, name if isinstance(name, str) else name.decode(), True, None, None)
    if not start <= stop <= len(text):
        raise ValueError(f"characters {start} to {stop} of {len(text)}")
    return Token(id_, text[start:stop], False, start, stop)


def progress_bar(
    texts: Sequence[bytes], requests: Sequence[Request], progress: bool | None
) -> tqdm[Any]:
    """A bar over texts on stderr. `progress=None` shows it on a terminal, for a long call only."""
    from tqdm import tqdm

    shown = (
        sys.stderr.isatty() and len(requests) >= BAR_FROM_REQUESTS if progress is None else progress
    )
    return tqdm(total=len(texts), unit="text", disable=not shown, leave=progress is True)
