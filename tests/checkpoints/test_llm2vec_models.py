"""Whole models as LLM2Vec saves them, under its own class names."""

import json

import pytest
import transformers

from bidirect_patch import is_bidirectional

from ..helpers.tiny_models import llama


def test_a_folder_that_llm2vec_saved_is_known(tmp_path, auto):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaBiModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_bidirectional(transformers.AutoModel.from_pretrained(tmp_path))


def test_a_folder_that_llm2vec_saved_is_said_to_be_one(tmp_path, only_warns):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaBiForMNTP"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained with bidirectional attention"):
        transformers.AutoModel.from_pretrained(tmp_path)
