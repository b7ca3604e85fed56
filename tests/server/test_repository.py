# SPDX-License-Identifier: Apache-2.0
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arrowhead_server.errors import RepositoryError
from arrowhead_server.repository import EmbeddingModel, read_repository


def test_reads_name_and_width_of_each_ensemble(make_repository: Callable[..., Path]) -> None:
    assert read_repository(make_repository()) == (EmbeddingModel("toy", 8, 1, "toy"),)


def test_the_repository_of_this_project_is_understood(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "model_repository"
    for part in ("minilm", "minilm_tokenizer", "minilm_encoder"):
        (tmp_path / part / "1").mkdir(parents=True)
        shutil.copy(source / part / "config.pbtxt", tmp_path / part)
    with pytest.raises(RepositoryError, match="'minilm' has no weights yet"):
        read_repository(tmp_path)
    (tmp_path / "minilm_encoder" / "1" / "weights.parquet").touch()
    assert read_repository(tmp_path) == (EmbeddingModel("minilm", 384, 1, "minilm"),)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"no model repository at .*nowhere.*--repository"):
        read_repository(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"holds no embedding model.*arrowhead convert"):
        read_repository(tmp_path)


def test_weights_not_converted_yet(make_repository: Callable[..., Path]) -> None:
    with pytest.raises(RepositoryError, match=r"'toy' has no weights yet.*arrowhead convert"):
        read_repository(make_repository(weights=False))


def test_the_highest_version_must_have_weights(make_repository: Callable[..., Path]) -> None:
    repository = make_repository()
    for part in ("toy", "toy_tokenizer", "toy_encoder"):
        (repository / part / "10").mkdir()
    with pytest.raises(RepositoryError, match=r"toy_encoder/10/weights\.parquet is missing"):
        read_repository(repository)


def test_parts_of_unequal_version_are_not_served(make_repository: Callable[..., Path]) -> None:
    """What a conversion leaves that is killed while it publishes."""
    repository = make_repository()
    (repository / "toy_tokenizer" / "2").mkdir()
    with pytest.raises(RepositoryError, match=r"unequal version \(toy 1, toy_tokenizer 2, toy_enc"):
        read_repository(repository)


def test_a_part_is_missing(make_repository: Callable[..., Path]) -> None:
    repository = make_repository()
    (repository / "toy_tokenizer" / "config.pbtxt").unlink()
    with pytest.raises(RepositoryError, match="'toy' needs 'toy_tokenizer'"):
        read_repository(repository)


def test_an_ensemble_of_unknown_width(make_repository: Callable[..., Path]) -> None:
    repository = make_repository()
    config = repository / "toy" / "config.pbtxt"
    config.write_text(config.read_text().replace("[ 8 ]", "[ -1 ]"))
    with pytest.raises(RepositoryError, match="no output of one fixed width"):
        read_repository(repository)
