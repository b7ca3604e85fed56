# SPDX-License-Identifier: Apache-2.0
"""input_ids, length -> embeddings; or text -> embeddings. Decodes, calls the engine, encodes."""

from __future__ import annotations

import json
import os
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from arrowhead_engine.account import Account, Batch
from arrowhead_engine.compute import instance_device
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import InvalidInput
from arrowhead_engine.last_step import LastStep
from arrowhead_engine.spec import Ids
from arrowhead_engine.stillness import Stillness


class TritonPythonModel:
    """All requests of a batch go through the network together, packed, whatever their lengths."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        processes = sum(group["count"] for group in config["instance_group"])
        folder = Path(args["model_repository"]).resolve()
        self.encoder = Encoder.open(
            folder / args["model_version"] / "weights.parquet",
            device=instance_device(args["model_instance_kind"], args["model_instance_device_id"]),
            dtype=config["parameters"]["compute_dtype"]["string_value"],
            # `arrowhead serve` names the folder. One process alone starts sooner without.
            shared=os.environ.get("ARROWHEAD_SHARED") if processes > 1 else None,
        )
        # Raises, and so keeps the model from being ready, unless its vectors are the certified.
        self.encoder.verify()
        self.embed = LastStep(self.encoder.embed)
        tokenizer = args["model_name"].removesuffix("_encoder") + "_tokenizer"
        self.tokenizer_folder = folder.parent / tokenizer / args["model_version"]
        family = partial(pb_utils.MetricFamily, kind=pb_utils.MetricFamily.COUNTER)
        self.account = Account(
            args["model_name"], args["model_version"], family, args["model_instance_name"]
        )
        if any("text" in one["inputs"] for one in config.get("model_warmup", ())):
            _ = self.tokenizer  # of an ensemble of one step; opened in a batch, it would hold it up
        self.stillness = Stillness(self.account.tell)

    @cached_property
    def tokenizer(self) -> Any:
        # Only an ensemble of one step sends text here; the others are spared the import.
        from arrowhead_engine.tokenizer import Tokenizer

        return Tokenizer.open(self.tokenizer_folder)

    def execute(self, requests: list[Any]) -> list[Any]:
        began = time.perf_counter()
        try:
            return self._answers(requests, began)
        finally:  # an exception is an answer, too
            self.stillness.check(began)

    def _answers(self, requests: list[Any], began: float) -> list[Any]:
        self.truncated = 0
        rows: list[Ids] = []
        parts: list[slice | InvalidInput] = []
        for request in requests:
            try:
                own = self._ids(request)
            except InvalidInput as error:
                parts.append(error)
            else:
                parts.append(slice(len(rows), len(rows) + len(own)))
                rows += own
        embeddings = self.embed(rows)
        answers = [
            _error(part)
            if isinstance(part, InvalidInput)
            else pb_utils.InferenceResponse([pb_utils.Tensor("embeddings", embeddings[part])])
            for part in parts
        ]
        made = self.embed.made
        self.account.add(
            Batch(
                texts=len(rows),
                tokens=sum(map(len, rows)),
                truncated=self.truncated,
                refused=[part for part in parts if isinstance(part, InvalidInput)],
                seconds=time.perf_counter() - began,
                computed=made.lengths,
                equal=made.equal,
                remembered=made.remembered,
            ),
            lambda: [request.request_id() for request in requests],
        )
        return answers

    def finalize(self) -> None:
        self.stillness.close()
        self.account.close()
        del self.embed, self.encoder  # the last process of its version removes what they shared

    def _ids(self, request: Any) -> list[Ids]:
        # Views of Triton's memory, gone when execute returns; the engine copies what it keeps.
        met = {t.name(): t for t in request.inputs()}
        if met.keys() == {"input_ids", "length"}:
            return self.encoder.check(met["input_ids"].as_numpy(), met["length"].as_numpy())
        if met.keys() == {"text"}:
            ids, truncated = self.tokenizer.encode_bytes(met["text"].as_numpy().ravel())
            self.truncated += sum(truncated)
            tokens = self.tokenizer.pad(ids, truncated)
            # Nobody has proved that this tokenizer is the one these weights were certified with.
            return self.encoder.check(tokens.input_ids, tokens.length)
        raise InvalidInput(f"inputs {', '.join(sorted(met))}; wanted text, or input_ids and length")


def _error(error: InvalidInput) -> Any:
    # An answer of its own: a raised exception would fail the neighbours in the batch too.
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    )
