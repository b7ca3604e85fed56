# SPDX-License-Identifier: Apache-2.0
"""Is the server alive? Asked with real inferences, because Triton's own readiness does not know.

A dead or hanging Python stub leaves `/v2/health/ready` at 200. The probe therefore runs a text
through each tokenizer and its ids through the encoder. It goes around the ensemble, whose response
cache would answer for a dead encoder, and is another text each time, for an encoder remembers its
last one. Standard library only: this runs beside every server, and tritonclient takes 50 MB and
0.5 s.
"""

import http.client
import itertools
import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from arrowhead_server.address import Address
from arrowhead_server.repository import EmbeddingModel

PROBE_TEXT = "ping"
# A model is held hung after this many probes in a row without an answer, during which it answered
# nobody else either.
FAILURES_IN_A_ROW = 3
SILENT_S = 3.0  # a processor that many share may keep an answer back for a second or two
Part = tuple[str, int]  # a tokenizer or encoder, and its version
_STATUS_TIMEOUT_S = 2.0
# Of balancers' questions. A batch of a hundred long texts takes a second or two on two cores; what
# has answered nobody for `_HANGS_AFTER_S` is taken out of rotation, though not restarted yet.
_READY_TIMEOUT_S = 1.0
_LOOKED_AT_AFTER_S = 1.0
_HANGS_AFTER_S = 5.0
# Triton's own word, within a second, that a model's process is dead or frozen.
_NOT_HEALTHY = "is not healthy"


class ProbeError(Exception):
    """A model gave no answer, or not the one asked for."""


@dataclass
class _Suspect:
    failures: int
    successes: int | None  # as counted by Triton; None if even that was not to be had


@dataclass
class _Question:
    """A probe that is waiting for its answer."""

    part: Part
    since: float
    successes: int | None = None  # of the part, when it was first looked at


class Pulse:
    """Beats on the models of one Triton process, and judges.

    Args:
        address: Where Triton listens.
        models: What to ask; may be changed between two beats.
        timeout_s: Seconds until an inference counts as unanswered. Generous: a probe waits in the
            same queue as everybody else, behind the largest batch.
    """

    def __init__(
        self, address: Address, models: Collection[EmbeddingModel], timeout_s: float
    ) -> None:
        self.models = models
        self._host = address.local_host
        self._port = address.http_port
        self._timeout_s = timeout_s
        self._suspects: dict[Part, _Suspect] = {}
        self._question: _Question | None = None
        self._not_healthy: str | None = None  # a part whose process did not answer Triton
        self._silences = 0
        self._number = itertools.count()

    def is_ready(self) -> bool:
        """Whether Triton is up, which it says once all that it found at its start is loaded."""
        return self._is_ok("/v2/health/ready")

    def has_loaded(self, model: EmbeddingModel) -> bool:
        """Whether Triton says that both parts are loaded at this version."""
        return all(self._is_ok(f"{_path(part, model.version)}/ready") for part in model.parts)

    def serves(self, model: EmbeddingModel) -> bool:
        """Whether Triton says that the ensemble itself is loaded at this version."""
        return self._is_ok(f"{_path(model.name, model.version)}/ready")

    def failures(self, models: Collection[EmbeddingModel] | None = None) -> dict[Part, str]:
        """Asks every model once, or these; what went wrong, by what failed."""
        failed: dict[Part, str] = {}
        for model in self.models if models is None else models:
            text = f"{PROBE_TEXT} {next(self._number)}"
            inputs = [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]
            for step, wanted in (
                (model.tokenizer, ("input_ids", "length")),
                (model.encoder, ("embeddings",)),
            ):
                if models is None:  # a version that is being proved says nothing of readiness
                    self._question = _Question((step, model.version), time.monotonic())
                try:
                    inputs = self._infer(step, model.version, inputs, wanted)
                except ProbeError as error:
                    failed[step, model.version] = str(error)
                    break
                finally:
                    if models is None:
                        self._question = None
        return failed

    @property
    def is_suspicious(self) -> bool:
        """Whether the last beat failed, so that the next had better come soon."""
        return bool(self._suspects or self._silences)

    def hanging(self) -> str | None:
        """What answers nobody now: Triton itself, or a model; None if all is well.

        Sooner than `beat`, for those who can send requests elsewhere, and wrong at no great price:
        a part that was only slow is ready again with its next answer. May be called by any thread.
        """
        if not self._is_ok("/v2/health/ready", _READY_TIMEOUT_S):
            return f"Triton did not answer within {_READY_TIMEOUT_S:g} s"
        if (part := self._not_healthy) is not None:
            return f"the process of model '{part}' does not answer"
        question = self._question
        if question is None or time.monotonic() - question.since < _LOOKED_AT_AFTER_S:
            return None
        successes = (self._success_counts("/v2/models/stats") or {}).get(question.part)
        if question.successes is None:
            question.successes = successes
        waited_s = time.monotonic() - question.since
        if waited_s < _HANGS_AFTER_S or question.successes != successes:
            return None
        return f"model '{question.part[0]}' has answered nobody for {waited_s:.0f} s"

    def beat(self) -> str | None:
        """Asks every model once; says which one must be held hung or broken for good, if any.

        A model that answers others is busy, not dead: probes may time out behind a long queue. So a
        failed probe counts only while Triton's own count of that model's answers stands still.
        """
        # Triton's front end answers this whatever its models do: one that is silent is frozen, and
        # their inferences need not be waited for.
        self._silences = 0 if self._is_ok("/v2/health/live", SILENT_S) else self._silences + 1
        if self._silences:
            times = f"{self._silences} times in a row within {SILENT_S:g} s"
            is_frozen = self._silences >= FAILURES_IN_A_ROW
            return f"Triton did not answer {times}" if is_frozen else None
        failed = self.failures()
        dead = (part for (part, _), error in failed.items() if _NOT_HEALTHY in error)
        self._not_healthy = next(dead, None)
        successes = (self._success_counts("/v2/models/stats") or {}) if failed else {}
        suspects: dict[Part, _Suspect] = {}
        for part, error in failed.items():
            before, now = self._suspects.get(part), successes.get(part)
            standstill = before is not None and before.successes == now
            count = before.failures + 1 if before is not None and standstill else 1
            suspects[part] = _Suspect(count, now)
            if count >= FAILURES_IN_A_ROW:
                return f"model '{part[0]}' failed {count} probes in a row: {error}"
        self._suspects = suspects
        return None

    def answers(self, model: EmbeddingModel) -> int | None:
        """How many requests the two parts have answered at this version; None if that is not known.

        By Triton's own count.
        """
        total = 0
        for part in model.parts:
            counts = self._success_counts(f"{_path(part, model.version)}/stats")
            if counts is None:
                return None
            total += sum(counts.values())
        return total

    def _infer(
        self, model: str, version: int, inputs: list[dict[str, Any]], wanted: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """The `wanted` outputs of `model`, in the form in which they are the next one's inputs."""
        body = json.dumps({"inputs": inputs, "outputs": [{"name": name} for name in wanted]})
        path = f"{_path(model, version)}/infer"
        status, answer = self._request("POST", path, body, self._timeout_s)
        if status != http.client.OK:
            raise ProbeError(f"status {status}, {answer.get('error', 'no reason given')}")
        try:
            return [
                {key: output[key] for key in ("name", "shape", "datatype", "data")}
                for output in answer["outputs"]
            ]
        except (KeyError, TypeError):
            raise ProbeError("an answer without the outputs asked for") from None

    def _success_counts(self, path: str) -> dict[Part, int] | None:
        """Answers by model and version; None if they are not to be had."""
        try:
            _, answer = self._request("GET", path, None, _STATUS_TIMEOUT_S)
            return {
                (model["name"], int(model["version"])): int(
                    model["inference_stats"]["success"]["count"]
                )
                for model in answer["model_stats"]
            }
        except (ProbeError, KeyError, TypeError, ValueError):
            return None

    def _is_ok(self, path: str, timeout_s: float = _STATUS_TIMEOUT_S) -> bool:
        try:
            status, _ = self._request("GET", path, None, timeout_s)
        except ProbeError:
            return False
        return status == http.client.OK

    def _request(
        self, method: str, path: str, body: str | None, timeout_s: float
    ) -> tuple[int, dict[str, Any]]:
        # One connection a request: an idle open one would hold up Triton's exit.
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Connection": "close"})
            response = connection.getresponse()
            text = response.read()
            answer = json.loads(text) if text else {}
        except TimeoutError:
            raise ProbeError(f"no answer within {timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ProbeError(f"connection failed, {error or type(error).__name__}") from error
        except ValueError:
            answer = None
        finally:
            connection.close()
        if not isinstance(answer, dict):
            raise ProbeError("an answer that is no JSON object")
        return response.status, answer


def _path(model: str, version: int) -> str:
    return f"/v2/models/{model}/versions/{version}"
