# SPDX-License-Identifier: Apache-2.0
"""`arrowhead evaluate` through the real server, against sentence-transformers' own vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from arrowhead_client.datasets import RetrievalSet, StsPairs
from arrowhead_client.evaluate import score_retrieval, score_sts
from arrowhead_server.supervisor import Server

SCIFACT = Path(__file__).parents[1] / "data" / "scifact-small"

# Ours, not of a published set; from the same meaning down to nothing in common.
PAIRS = """sentence1,sentence2,score
The train left ten minutes late.,The train departed with a delay of ten minutes.,5
She plants tomatoes every spring.,Each spring she grows tomatoes.,4.8
The library closes at eight.,"At eight o'clock, the library shuts.",4.9
He repaired the old bicycle.,He bought a new bicycle.,2.2
A storm damaged the harbour.,The harbour was damaged.,3.8
The soup needs more salt.,The soup is too salty.,2.9
They moved to the coast last year.,Last year they visited the coast.,2.8
The bridge is closed to lorries.,Heavy vehicles may not use the bridge.,4
My sister teaches physics.,A teacher is in the classroom.,1.4
The cat sleeps on the windowsill.,The parliament passed a new budget.,0
Water boils at a lower temperature on mountains.,The mountain road was icy.,0.8
The orchestra rehearses on Tuesdays.,Bread should rest before it is cut.,0
"""

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def reference(minilm_source: Path) -> Embed:
    """sentence-transformers in float32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_source), device="cpu")
    return lambda texts: np.asarray(model.encode(list(texts)), np.float32)


def test_the_scores_are_those_of_sentence_transformers(
    server: Server, reference: Embed, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(PAIRS)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "arrowhead_client.cli", "evaluate", "minilm"),
            *("--url", server.grpc_url, "--sts", str(file), "--retrieval", str(SCIFACT), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    met = {row["measure"]: row["value"] / 100 for row in json.loads(run.stdout)["scores"]}
    scores = score_sts(StsPairs.read(file), reference)
    scores += score_retrieval(RetrievalSet.read(SCIFACT), reference)
    assert met == pytest.approx({s.measure: s.value / 100 for s in scores}, abs=0.002)
    # And the model does know something of both: vectors of noise would agree with themselves too.
    assert met["STS Spearman"] > 0.8
    assert 0.7 < met["nDCG@10"] < 1


def test_vectors_of_fewer_bits_are_scored_as_they_are_stored(
    server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(PAIRS)

    def score(*options: str) -> float:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "arrowhead_client.cli", "evaluate", "minilm", "--json"),
                *("--url", server.grpc_url, "--sts", str(file), *options),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        (row,) = json.loads(run.stdout)["scores"]
        return float(row["value"])

    whole = score()
    assert score("--precision", "int8") == pytest.approx(whole, abs=2)
    rough = score("--precision", "binary", "--dimensions", "64")
    assert rough != pytest.approx(whole, abs=0.01)
    assert rough > 50
