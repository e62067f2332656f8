"""Both caches, of tokenised rows and of the datasets library, start empty in every test and end with it."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_ENGINE_DATA_CACHE", str(tmp_path / "data_cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
