# SPDX-License-Identifier: Apache-2.0
"""Every network that transformers knows and this engine has no file for: transformers' own module.

It is built without memory (on torch's meta device) and then given the weight file's tensors, which
stay where they are, in the map, wherever stored and compute dtype agree. No code that comes with a
model is ever run. Texts of similar length go through it side by side, padded at the end.

The only module of the engine that imports transformers, and only when such a model is opened: its
import takes a second and 100 MB, which the networks of `architectures.py` do without.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.packing import Step
from arrowhead_engine.sizes import Shapes
from arrowhead_engine.tensors import Tensors

NO_LIMIT = 1 << 20  # tokens, of networks without a table of positions
# Of these only the half that reads is wanted; transformers' AutoModel would make both.
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}
# What a `config.json` may say that is not of the network: of its file, or of how to run it, which
# would change what the module returns, or have it run by code from elsewhere.
_NOT_OF_THE_NETWORK = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "return_dict",
    "chunk_size_feed_forward",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
)


class GeneralConfig:
    """A `config.json` that transformers understands, and the module it describes."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Builds the module on the meta device.

        Raises:
            UnsupportedModel: transformers is not installed, or does not know such a network.
        """
        self._raw = {key: raw[key] for key in raw if key not in _NOT_OF_THE_NETWORK}
        model_type = str(raw.get("model_type"))
        if raw.get("quantization_config"):
            raise UnsupportedModel(
                f"{model_type}: its checkpoint is quantised already; name the full one"
            )
        transformers = _transformers(model_type)
        if model_type not in transformers.CONFIG_MAPPING:
            own_code = ", or it needs code of its own, which is never run"
            raise UnsupportedModel(
                f"architecture {model_type!r}: transformers {transformers.__version__} has no such "
                f"network{own_code if raw.get('auto_map') else ''}"
            )
        rest = {key: value for key, value in self._raw.items() if key != "model_type"}
        try:
            config = transformers.AutoConfig.for_model(model_type, **rest).get_text_config()
            # What was said before is not kept for a next token.
            config.use_cache = False
            self._class = (
                getattr(transformers, ENCODERS[model_type])
                if model_type in ENCODERS
                else transformers.AutoModel._model_mapping[type(config)]
            )
            takes = inspect.signature(self._class).parameters
            self._options = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
            with torch.device("meta"):
                module = self._class(config, **self._options)
            words = module.get_input_embeddings().weight
            width = int(config.hidden_size)
        except Exception as error:  # whatever a configuration makes transformers raise
            raise UnsupportedModel(
                f"architecture {model_type!r}: transformers cannot build it as an encoder of text: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._config = config
        self.model_type = model_type
        self.width = width
        self.vocab_size = int(words.shape[0])
        limit = getattr(config, "max_position_embeddings", None)
        self.most_tokens = limit if type(limit) is int and limit > 0 else NO_LIMIT
        self.prefix = f"{module.base_model_prefix}." if module.base_model_prefix else ""
        self.shapes = _shapes(module)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values."""
        raw: dict[str, Any] = json.loads(json.dumps(self._raw))
        return raw

    def load(self, folder: str) -> dict[str, Tensor]:
        """A checkpoint's tensors under the module's names, read by transformers itself.

        It knows how the names and cuts of older checkpoints become those of today's module.

        Raises:
            UnsupportedModel: all that is missing or of another shape, at once.
        """
        with _quiet(self.model_type):
            module, report = self._class.from_pretrained(
                folder,
                config=self._config,
                dtype="auto",
                local_files_only=True,
                output_loading_info=True,
                **self._options,
            )
        faults = [f"missing {name}" for name in sorted(report["missing_keys"])]
        faults += [f"misshapen {name}" for name in sorted(map(str, report["mismatched_keys"]))]
        if faults:
            raise UnsupportedModel(f"{folder}: {'; '.join(faults)}")
        state: dict[str, Tensor] = module.state_dict()
        return {name: state[name] for name in self.shapes}

    def build(self, weight: Tensors, dtype: torch.dtype) -> Any:
        """The module in `dtype`, over the file's own tensors where they have that dtype.

        Raises:
            UnsupportedModel: transformers would make up a tensor that the file does not hold.
        """
        with _quiet(self.model_type):
            module, report = self._class.from_pretrained(
                None,
                config=self._config,
                state_dict={name: weight(name).to(dtype) for name in self.shapes},
                dtype=dtype,
                output_loading_info=True,
                **self._options,
            )
        if missing := sorted(report["missing_keys"]):
            raise UnsupportedModel(f"{self.model_type}: tensors missing: {', '.join(missing)}")
        return module.eval()


class General:
    """The network: `Step` -> token vectors float32 [T, D]."""

    def __init__(self, config: GeneralConfig, weight: Tensors, dtype: torch.dtype) -> None:
        """Builds transformers' module around the tensors of `weight(name)`."""
        self._module = config.build(weight, dtype)
        self.ragged = False

    def __call__(self, step: Step) -> Tensor:
        """The vector of every real token in the step."""
        parts = []
        for group in step.groups:
            ids = step.input_ids[group.start : group.stop].long()
            if group.gather is not None:
                ids = ids.index_select(0, group.gather)
            ids = ids.view(group.texts, group.length)  # [B, S]
            mask = torch.ones_like(ids) if group.mask is None else group.mask[:, 0, 0].long()
            out = self._module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            rows = out.reshape(group.texts * group.length, -1)
            parts.append(rows if group.scatter is None else rows.index_select(0, group.scatter))
        return torch.cat(parts)


@contextmanager
def _quiet(model_type: str) -> Iterator[None]:
    """Without transformers' bar, and its table of keys, which the caller reports in one line."""
    logging = _transformers(model_type).utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _transformers(model_type: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UnsupportedModel(
            f"architecture {model_type!r} runs through transformers, which is not installed: "
            "pip install 'arrowhead[general]'"
        ) from error
    return transformers


def _shapes(module: nn.Module) -> Shapes:
    """Name and shape of the tensors a checkpoint must hold; of tied ones the first name only."""
    table = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in module.state_dict().items():
        if name not in every:
            table[name] = tuple(value.shape)
    return table
