# SPDX-License-Identifier: Apache-2.0
"""The kernels give what transformers and the torch engine give, whatever the threads and texts."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrowhead_engine import compute
from arrowhead_engine.architectures import POST_NORM, architecture
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import UnsupportedModel
from arrowhead_engine.native import NativeEngine
from arrowhead_engine.pooling import POOLINGS
from arrowhead_engine.spec import MODEL_KEY, Ids, ModelSpec
from arrowhead_engine.weightfile import Tensor, WeightFile
from arrowhead_engine.weightwriter import write

from . import random_models
from .random_models import VOCAB, post_norm_configs

WHY_NOT = compute._not_native("cpu", "float32", plain=True)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no native engine: {WHY_NOT}")

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 224,
    "max_position_embeddings": 160,
}
CONFIGS = post_norm_configs(SIZES)
# Alone, equal, all different; for two threads and more, together and apart.
MIXES = [[1], [150], [7, 7, 7], [2, 150, 3, 64, 65, 9], list(range(1, 60)), [12] * 100]


def test_every_architecture_that_has_a_plan_is_tested() -> None:
    assert CONFIGS.keys() == POST_NORM.keys()


def model_file(name: str, folder: Path, dtype: str = "float32") -> tuple[Any, Path]:
    """A random network of transformers, and its weight file."""
    return random_models.model_file(name, CONFIGS[name], folder, dtype, seed=3)


def texts(lengths: list[int], seed: int = 0) -> list[Ids]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCAB, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_file(request.param, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file("mpnet", tmp_path_factory.mktemp("mpnet"))[1]


def engine_of(path: Path, *, dtype: str = "float32", threads: int, poolings: Any) -> NativeEngine:
    weights = WeightFile.open(path)
    spec = ModelSpec.from_metadata(weights.metadata)
    kind = architecture(spec.architecture)
    assert kind.plan is not None
    plan = kind.plan(kind.config(spec.config))
    return NativeEngine(weights, plan, spec.max_seq_length, poolings, dtype, threads)


@pytest.mark.parametrize("lengths", MIXES, ids=lambda mix: f"{len(mix)}x{max(mix)}")
def test_equals_transformers(pair: Any, lengths: list[int]) -> None:
    model, path = pair
    rows = texts(lengths)
    encoder = Encoder.open(path, device="cpu", dtype="float32")
    assert encoder.compute.engine == "native"
    wanted = []
    for row in rows:
        with torch.no_grad():
            tokens = model(input_ids=torch.from_numpy(row.astype(np.int64))[None])[0][0]
        wanted.append(torch.nn.functional.normalize(tokens.mean(0), dim=0).numpy())
    assert np.abs(encoder.embed(rows) - np.stack(wanted)).max() <= 1e-5


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.999), ("int8", 0.998)])
def test_narrow_products_are_close(pair: Any, dtype: str, least: float) -> None:
    if why := compute._not_native("cpu", dtype, plain=True):
        pytest.skip(why)
    rows = texts([1, 2, 5, 12, 13, 15, 16, 17, 31, 32, 33, 40, 64, 149, 150])
    met = Encoder.open(pair[1], device="cpu", dtype=dtype, engine="native").embed(rows)
    exact = Encoder.open(pair[1], device="cpu", dtype="float32").embed(rows)
    assert least < (met * exact).sum(1).min() < 0.999999


def test_sums_of_attention_in_int8_do_not_overflow(tmp_path: Path) -> None:
    """All tokens are the same, and weigh the same: the largest sum of the largest numbers."""
    same = {"position_embeddings.weight": lambda x: x.__imul__(np.float32(0))}
    path = changed(model_file("bert", tmp_path)[1], same)
    engine = engine_of(path, dtype="int8", threads=1, poolings=["mean"])
    met = engine([np.full(n, 77, np.int32) for n in range(1, 151)], None)
    np.testing.assert_allclose(met, np.broadcast_to(met[0], met.shape), atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("lengths", MIXES, ids=lambda mix: f"{len(mix)}x{max(mix)}")
def test_neither_threads_nor_neighbours_change_a_bit(
    mpnet: Path, lengths: list[int], dtype: str
) -> None:
    rows = texts(lengths)
    alone = engine_of(mpnet, dtype=dtype, threads=1, poolings=["mean"])
    wanted = np.concatenate([alone([row], None) for row in rows])
    for threads in (1, 2, 3, 7):
        engine = engine_of(mpnet, dtype=dtype, threads=threads, poolings=["mean"])
        for _ in range(20):  # threads come in another order every time
            np.testing.assert_array_equal(engine(rows, None), wanted)


def test_every_pooling_with_and_without_a_prompt_left_out(mpnet: Path) -> None:
    from arrowhead_engine.torch_engine import POOL

    rows, width = texts([4, 9, 33]), 96
    plain = engine_of(mpnet, threads=2, poolings=["lasttoken"])
    native = engine_of(mpnet, threads=2, poolings=POOLINGS)
    assert native._network != plain._network
    encoder = Encoder.open(mpnet, device="cpu", dtype="float32", engine="torch")
    engine: Any = encoder._engine
    for skips in (None, [0, 2, 5]):
        engine._pools = [POOL[name] for name in POOLINGS]
        met, wanted = native(rows, skips), engine(rows, skips)
        assert met.shape == (3, len(POOLINGS) * width)
        np.testing.assert_allclose(met, wanted, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_however_the_weights_are_stored(tmp_path: Path, dtype: str) -> None:
    _, path = model_file("bert", tmp_path, dtype)
    rows = texts([3, 60, 150])
    met = Encoder.open(path, device="cpu", dtype="float32", engine="native").embed(rows)
    wanted = Encoder.open(path, device="cpu", dtype="float32", engine="torch").embed(rows)
    np.testing.assert_allclose(met, wanted, atol=2e-6)


def test_weights_of_one_product_stored_differently(tmp_path: Path) -> None:
    _, path = model_file("bert", tmp_path, "float16")
    with WeightFile.open(path) as weights:
        tensors = [
            t._replace(dtype="float32", data=np.frombuffer(t.data, "<f2").astype("<f4").tobytes())
            if t.name.endswith("query.weight")
            else t
            for t in weights.stream()
        ]
        write(tmp_path / "mixed.parquet", tensors, weights.metadata)
    rows = texts([3, 60])
    met = Encoder.open(tmp_path / "mixed.parquet", device="cpu", dtype="float32").embed(rows)
    wanted = Encoder.open(path, device="cpu", dtype="float32").embed(rows)
    np.testing.assert_allclose(met, wanted, atol=1e-6)


def test_weights_of_nothing_but_zeros(tmp_path: Path) -> None:
    """Nothing is divided by a scale of zero."""
    _, path = model_file("bert", tmp_path)
    with WeightFile.open(path) as weights:
        tensors = [t._replace(data=bytes(len(t.data))) for t in weights.stream()]
        write(tmp_path / "zeros.parquet", tensors, weights.metadata)
    for dtype in ("float32", "int8"):
        met = Encoder.open(tmp_path / "zeros.parquet", device="cpu", dtype=dtype).embed(texts([5]))
        np.testing.assert_array_equal(met, np.zeros((1, 96), np.float32))


def test_words_stay_in_the_map(minilm_weights: Path) -> None:
    encoder = Encoder.open(minilm_weights, device="cpu", dtype="float32", engine="native")
    base = np.frombuffer(encoder._weights.map(), np.uint8)
    words = encoder._engine._plan.words  # type: ignore[attr-defined]
    assert 0 < words - base.ctypes.data < base.nbytes


def changed(path: Path, change: dict[str, Any]) -> Path:
    """The float32 file with the tensors whose names end so changed in place by these functions."""

    def of(tensor: Tensor) -> Tensor:
        values = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape).copy()
        for ending, do in change.items():
            if tensor.name.endswith(ending):
                do(values)
        return tensor._replace(data=values.tobytes())

    target = path.with_name("changed.parquet")
    with WeightFile.open(path) as weights:
        write(target, [of(tensor) for tensor in weights.stream()], weights.metadata)
    return target


@pytest.mark.parametrize("size", [1e8, 1e12, 1e18])
def test_gelu_and_softmax_of_numbers_of_any_size(tmp_path: Path, size: float) -> None:
    """What is far below comes out as 0, not as infinity."""
    by, back = (
        (lambda x: x.__imul__(np.float32(size))),
        (lambda x: x.__imul__(np.float32(1 / size))),
    )
    path = changed(
        model_file("bert", tmp_path)[1],
        {
            "attention.self.query.weight": by,
            "intermediate.dense.weight": by,
            "output.dense.weight": lambda x: back(x) if x.shape == (96, 224) else None,
        },
    )
    rows = texts([1, 9, 40])
    met = Encoder.open(path, device="cpu", dtype="float32", engine="native").embed(rows)
    wanted = Encoder.open(path, device="cpu", dtype="float32", engine="torch").embed(rows)
    np.testing.assert_allclose(met, wanted, atol=1e-4)


def test_what_is_not_a_number_shows_in_int8_too(tmp_path: Path) -> None:
    word = int(texts([5])[0][3])
    nan = {"word_embeddings.weight": lambda x: x[word].fill(np.nan)}
    path = changed(model_file("bert", tmp_path)[1], nan)
    for dtype in ("float32", "int8"):
        met = engine_of(path, dtype=dtype, threads=1, poolings=["cls"])(texts([5]), None)
        assert np.isnan(met).all()


@pytest.mark.parametrize(
    "row", [[], [1] * 151, [-1], [500], [2**31 - 1]], ids=["none", "many", "below", "above", "far"]
)
def test_ids_that_nobody_checked_do_not_reach_the_kernels(mpnet: Path, row: list[int]) -> None:
    encoder = Encoder.open(mpnet, dtype="float32", engine="native")
    fine = np.array([1, 2, 3], np.int32)
    with pytest.raises(ValueError, match="wanted 1 to 150, below 500"):
        encoder.embed([fine, np.array(row, np.int32)])
    assert encoder.embed([fine]).shape == (1, encoder.spec.dimension)


def test_threads_of_python_wait_for_each_other(mpnet: Path) -> None:
    engine = engine_of(mpnet, threads=2, poolings=["mean"])
    mixes = [texts([n] * 8, n) for n in (5, 90, 150)]
    wanted = [engine(rows, None) for rows in mixes]

    def right(i: int) -> bool:
        return np.array_equal(engine(mixes[i % 3], None), wanted[i % 3])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(right, range(300)))


def test_sizes_that_the_kernels_do_not_know_go_to_torch(tmp_path: Path) -> None:
    raw = {**SIZES, "num_attention_heads": 6, "model_type": "bert"}  # 16 wide
    kind = architecture("bert")
    config = kind.config(raw)
    rng = np.random.default_rng(0)
    tensors = [
        Tensor(name, "float32", shape, (rng.standard_normal(shape) / 9).astype("<f4").tobytes())
        for name, shape in kind.shapes(config).items()
    ]
    spec = ModelSpec("bert", config.to_dict(), "mean", True, 150, 96)
    path = tmp_path / "weights.parquet"
    write(path, tensors, {MODEL_KEY: spec.to_json()})
    assert Encoder.open(path, device="cpu").compute.engine == "torch"
    with pytest.raises(UnsupportedModel, match="it does not know this network, or these sizes"):
        Encoder.open(path, device="cpu", dtype="float32", engine="native")


def test_memory_is_given_back(minilm_weights: Path) -> None:
    def private() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in rollup.splitlines() if "Private_D" in line)

    rows = [np.arange(1000, 1256, dtype=np.int32)] * 4
    Encoder.open(minilm_weights, device="cpu", dtype="float32").embed(rows)
    gc.collect()
    before, threads = private(), len(list(Path("/proc/self/task").iterdir()))
    for _ in range(10):  # each lays out 21 MB
        Encoder.open(minilm_weights, device="cpu", dtype="float32").embed(rows)
    gc.collect()
    assert private() - before < 30_000  # kB
    assert len(list(Path("/proc/self/task").iterdir())) == threads


LITTLE_MEMORY = """
import resource, sys, numpy as np
from arrowhead_engine.encoder import Encoder
encoder = Encoder.open(sys.argv[1], device="cpu", dtype="float32")
few, many = ([np.arange(1000, 1256, dtype=np.int32) + i for i in range(n)] for n in (1, 100))
encoder.embed(few)
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + 2**16, now + 2**16))
try:
    encoder._engine(many * 2000, None)
except MemoryError as error:
    print("refused:", error)
encoder.embed(few)
print("and goes on")
"""


def test_without_memory_it_says_so_and_goes_on(minilm_weights: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, minilm_weights],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "refused:" in out.stdout
    assert out.stdout.endswith("and goes on\n")


FORKED = """
import os, sys, numpy as np
from arrowhead_engine import native
from arrowhead_engine.encoder import Encoder
native.processors = lambda: 6
encoder = Encoder.open(sys.argv[1], device="cpu", dtype="float32")
rows = [np.arange(1000, 1200, dtype=np.int32) + i for i in range(8)]
wanted = encoder.embed(rows)
child = os.fork()
same = np.array_equal(encoder.embed(rows), wanted)
if child == 0:
    del encoder
    sys.exit(not same)
print(same, os.waitpid(child, 0)[1])
"""


def test_a_forked_process_embeds_and_ends(minilm_weights: Path) -> None:
    """Though it has none of the threads."""
    out = subprocess.run(
        [sys.executable, "-c", FORKED, minilm_weights],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert out.stdout == "True 0\n"


AT_THE_END = """
import sys, threading, time, numpy as np
from arrowhead_engine import native
from arrowhead_engine.encoder import Encoder
native.processors = lambda: 1
encoder = Encoder.open(sys.argv[1], device="cpu", dtype="float32")
rows = [np.arange(1000, 1250, dtype=np.int32) + i for i in range(60)]
threading.Thread(target=encoder.embed, args=[rows], daemon=True).start()
time.sleep(0.1)
"""


def test_the_interpreter_may_end_while_a_daemon_thread_embeds(minilm_weights: Path) -> None:
    for _ in range(3):
        subprocess.run([sys.executable, "-c", AT_THE_END, minilm_weights], check=True)


def test_it_needs_neither_torch_nor_a_parquet_library(minilm_weights: Path) -> None:
    code = (
        "import sys, numpy as np; from arrowhead_engine.encoder import Encoder;"
        "e = Encoder.open(sys.argv[1], device='cpu', dtype='float32'); e.verify();"
        "print(e.compute, {'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, minilm_weights], capture_output=True, text=True, check=True
    )
    assert out.stdout == "cpu float32, native engine set()\n"
