# SPDX-License-Identifier: Apache-2.0
"""Everything that can go wrong, as one tree, and the one table that places a server's status in it.

    ArrowheadError                 catch this to catch them all
    ├── InvalidUrl                 the address cannot be read                 (also a ValueError)
    ├── InvalidInput               an argument cannot be sent                 (also a ValueError)
    │   └── TextTooLong            the model would not read all of a text, and none may be cut
    ├── ClientClosed               the client was used after `close()`
    ├── NotInstalled               what an extra brings is missing            (also an ImportError)
    ├── IndexFailed                an index of documents, or the way to it
    │   ├── IndexNotFound          there is none in this folder
    │   ├── IndexExists            there is one already
    │   ├── IndexBusy              another process is writing to it
    │   ├── IndexDamaged           it cannot be read
    │   └── OtherModel             its vectors are not of the model that is asked
    └── ServerError                the server, or the way to it; `.status` where one was received
        ├── InvalidRequest         the server refused this request: do not send it again
        ├── ModelNotFound          the server runs, but not with this model
        ├── Unavailable            nobody answered, or not now: the only error that is retried
        │   └── ModelNotReady      the server runs, and its model loads, or another version is live
        ├── TimedOut               no answer within `timeout_s`               (also a TimeoutError)
        └── UnexpectedResponse     an answer that is not what the model's contract says

An error's text names what was met, what was wanted and what to do next. `exit_code` is what the
command line exits with.
"""

from __future__ import annotations

import re

_MOST_TOLD = 2000  # characters of a server's error


class ArrowheadError(Exception):
    """The root: any error this package raises on purpose."""

    exit_code = 1


class InvalidUrl(ArrowheadError, ValueError):
    """The address of the server cannot be read."""


class InvalidInput(ArrowheadError, ValueError):
    """An argument is out of its range, or a text cannot be sent. Found before anything is sent."""


class TextTooLong(InvalidInput):
    """A text has more tokens than the model reads, and the caller did not ask to cut it."""


class ClientClosed(ArrowheadError):
    """The client was used after `close()`."""


class NotInstalled(ArrowheadError, ImportError):
    """A package that an extra brings is not installed; the message has the command."""


class IndexFailed(ArrowheadError):
    """An index of documents cannot be used as was asked."""


class IndexNotFound(IndexFailed):
    """There is no index in this folder."""


class IndexExists(IndexFailed):
    """There is an index in this folder already."""


class IndexBusy(IndexFailed):
    """Another process, or another `Index` of this one, is writing to the index."""


class IndexDamaged(IndexFailed):
    """The index cannot be read, or was made by another version."""


class OtherModel(IndexFailed):
    """The index holds vectors of another model than the one that is asked."""


class ServerError(ArrowheadError):
    """The server failed, or the way to it did.

    Attributes:
        status: the status as received, such as `"503"` or `"StatusCode.UNAVAILABLE"`; None when no
            answer came.
    """

    def __init__(self, message: str, *, status: str | None = None) -> None:
        super().__init__(message)
        self.status = status

    def __str__(self) -> str:
        # The server's own words are in it: one line, whatever they are, and none that a terminal
        # would obey.
        line = " ".join(super().__str__().split())[:_MOST_TOLD]
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


class InvalidRequest(ServerError):
    """The server refused this request; sending it again cannot help."""


class ModelNotFound(ServerError):
    """The server runs, but does not serve this model."""


class Unavailable(ServerError):
    """Nobody answered: no server, one that starts, stops or sheds load, or a model that died."""


class ModelNotReady(Unavailable):
    """The server runs, and this version of the model loads, or was there: another may be live."""


class TimedOut(ServerError, TimeoutError):
    """No answer within `timeout_s`."""


class UnexpectedResponse(ServerError):
    """The answer is not what the model's contract says."""


# Triton gives the same cause as an HTTP status or as a gRPC status.
STATUSES: dict[type[ServerError], tuple[str, str]] = {
    InvalidRequest: ("400", "StatusCode.INVALID_ARGUMENT"),
    ModelNotFound: ("404", "StatusCode.NOT_FOUND"),
    Unavailable: ("503", "StatusCode.UNAVAILABLE"),
    TimedOut: ("504", "StatusCode.DEADLINE_EXCEEDED"),
}
_CLASS_OF = {status: error for error, pair in STATUSES.items() for status in pair}
_NOT_READY = "Request for unknown model"  # "... version 1 is not at ready state"
# A model's process died or is frozen, and Triton's word for it is that of any fault of its own.
# `arrowhead serve` starts it anew within seconds.
_FAULT = ("500", "StatusCode.INTERNAL")
_DEAD_MODEL = re.compile(
    r"Stub process '[^']*' is not healthy|Failed to obtain the health mutex"  # it died with it
)
# gRPC's word for an answer that ends without a status: who gave it died meanwhile, and a proxy had
# passed on its beginning already (grpc/grpc#13800).
_CUT_OFF = ("StatusCode.UNKNOWN", "Stream removed")


def from_status(status: str | None, message: str, *, server: str, timeout_s: float) -> ServerError:
    """The error for a status a server answered with.

    Args:
        status: an HTTP status (`"503"`) or a gRPC one (`"StatusCode.UNAVAILABLE"`).
        message: what the server said.
        server: the server's address, for the message.
        timeout_s: how long was waited for, in seconds.
    """
    error = _CLASS_OF.get(status or "", ServerError)
    name = (status or "no status").removeprefix("StatusCode.")
    said = " ".join(message.split())
    if error is Unavailable and _NOT_READY in said:
        return ModelNotReady(
            f"{server} does not serve this version of the model now ({name}: {said}). It loads, or "
            "another is live: ask again.",
            status=status,
        )
    if error is Unavailable:
        return unavailable(server, message, status=status)
    if error is TimedOut:
        return timed_out(server, timeout_s, status=status)
    if status in _FAULT and _DEAD_MODEL.search(said):
        return Unavailable(
            f"{server} cannot answer now: a model's process died or hangs ({name}: {said}). "
            "`arrowhead serve` starts it anew within seconds: ask again.",
            status=status,
        )
    if status == _CUT_OFF[0] and said.startswith(_CUT_OFF[1]):
        return Unavailable(
            f"an answer of {server} broke off ({name}: {said}): ask again.", status=status
        )
    if error is ModelNotFound:
        return error(
            f"{server} does not serve this model ({name}: {said}). Check the model's name "
            "against those in the server's model repository.",
            status=status,
        )
    verb = "refused the request" if error is InvalidRequest else "failed"
    return error(f"{server} {verb} ({name}): {said}", status=status)


def unavailable(server: str, cause: object, *, status: str | None = None) -> Unavailable:
    """The error for a server that did not answer, or said that it cannot now."""
    said = " ".join(str(cause).split()) or type(cause).__name__
    return Unavailable(
        f"no server answers at {server} ({said}). Is it running, and is the protocol right? "
        "`arrowhead serve` starts one.",
        status=status,
    )


def timed_out(server: str, timeout_s: float, *, status: str | None = None) -> TimedOut:
    """The error for an answer that did not come in `timeout_s` seconds."""
    return TimedOut(
        f"{server} did not answer within {timeout_s:.3g} s. Raise timeout_s, or lower batch_size.",
        status=status,
    )


def unexpected(server: str, met: object) -> UnexpectedResponse:
    """The error for an answer that is no answer of the inference protocol."""
    return UnexpectedResponse(
        f"{server} answered with something that is not the inference protocol "
        f"({type(met).__name__}: {met}). Does this address belong to Triton, and does its port "
        "speak the protocol of the url (by default 8000 is http, 8001 is grpc)?"
    )
