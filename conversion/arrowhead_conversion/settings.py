# SPDX-License-Identifier: Apache-2.0
"""How a model is served: in what dtype, how many steps, how many processes. By `config.pbtxt`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from arrowhead_conversion import pins
from arrowhead_conversion.errors import RegistryError
from arrowhead_conversion.repository import TEMPLATE, locked, template
from arrowhead_engine.compute import DTYPES

COMPUTE_DTYPES = ("auto", *DTYPES)
Steps = Literal["fused", "two-step"]

# One step: the encoder's process tokenizes too. The ensemble around it holds the response cache.
FUSED = """ensemble_scheduling {{
  step [
    {{
      model_name: "{name}_encoder"
      model_version: {version}
      input_map {{ key: "text" value: "text" }}
      output_map {{ key: "embeddings" value: "embeddings" }}
    }}
  ]
}}"""
# So that the encoder has read its tokenizer before it is ready.
ONE_TEXT = "one text"
WARMUP = f"""
model_warmup {{
  name: "{ONE_TEXT}"
  batch_size: 1
  inputs {{ key: "text" value {{ data_type: TYPE_STRING dims: [ 1 ] zero_data: true }} }}
}}
"""
_COUNT = re.compile(r"(\binstance_group\b[^]]*?\bcount\s*:\s*)(\d+)", re.DOTALL)


def set_compute_dtype(repository: Path, name: str, dtype: str) -> None:
    """Has the encoder compute in `dtype`, one of `COMPUTE_DTYPES`; served from the next start.

    Raises:
        RegistryError: there is no such model, or its configuration names no dtype.
    """
    path = _existing(repository, name) / f"{name}_encoder" / "config.pbtxt"
    with locked(repository, name):
        text = path.read_text(encoding="utf-8")
        place = pins.parameter(text, "compute_dtype")
        if place is None:
            raise RegistryError(f"{path} has no parameter compute_dtype to set")
        pins.replace(path, text[: place[0]] + dtype + text[place[1] :])


def set_instances(repository: Path, name: str, count: int) -> None:
    """Has so many processes encode (on each GPU, where there are some); from the next start.

    A second one answers short texts while the first is busy with a long request.

    Raises:
        RegistryError: there is no such model, or its configuration names no count.
    """
    path = _existing(repository, name) / f"{name}_encoder" / "config.pbtxt"
    with locked(repository, name):
        text = path.read_text(encoding="utf-8")
        found = _COUNT.search(pins.masked(text))
        if found is None:
            raise RegistryError(f"{path} has no instance_group with a count to set")
        pins.replace(path, f"{text[: found.start(2)]}{count}{text[found.end(2) :]}")


def set_steps(repository: Path, name: str, steps: Steps) -> None:
    """Chains tokenizer and encoder ("two-step"), or has the encoder tokenize ("fused").

    The vectors are the same. One step less saves a text on its own its way through a process.

    Raises:
        RegistryError: there is no such model, or its encoder takes no text.
    """
    path = _existing(repository, name) / name / "config.pbtxt"
    encoder = repository / f"{name}_encoder" / "config.pbtxt"
    with locked(repository, name):
        its_text = encoder.read_text(encoding="utf-8")
        if steps == "fused" and "text" not in pins.strings(its_text, "name"):
            raise RegistryError(
                f"{encoder} declares no input text, as earlier versions did not: convert the model "
                "again under another name"
            )
        text = path.read_text(encoding="utf-8")
        places = list(pins.fields(text, "ensemble_scheduling"))
        if not places:
            raise RegistryError(f"{path} has no ensemble_scheduling to set")
        version = pins.pin(path.parent) or -1
        start, end = places[0]
        changed = text[:start] + scheduling(name, version, steps) + text[end:]
        for start, end in reversed(list(pins.fields(its_text, "model_warmup"))):
            if pins.strings(its_text[start:end], "name") == [ONE_TEXT]:
                its_text = its_text[:start].rstrip() + "\n" + its_text[end:].lstrip("\n")
        pins.replace(encoder, its_text + WARMUP if steps == "fused" else its_text)
        pins.replace(path, changed)


def scheduling(name: str, version: int, steps: Steps) -> str:
    """The ensemble's steps as text: tokenizer and encoder, or the encoder alone ("fused")."""
    if steps == "fused":
        return FUSED.format(name=name, version=version)
    text = (template() / TEMPLATE / "config.pbtxt").read_text(encoding="utf-8")
    text = pins.with_pin(text.replace(f'"{TEMPLATE}', f'"{name}'), version)
    start, end = next(pins.fields(text, "ensemble_scheduling"))
    return text[start:end]


def _existing(repository: Path, name: str) -> Path:
    if not pins.versions(repository, name) or not (repository / name / "config.pbtxt").is_file():
        raise RegistryError(f"{repository} holds no model {name!r}; `arrowhead models` lists them")
    return repository
