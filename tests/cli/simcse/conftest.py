"""Fixtures of the tests of `bidirect-patch simcse`."""

import pytest

from ...helpers.sentences import write_folder
from ...helpers.simcse_runs import published


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder with `model`, a tiny causal Llama, `mntp`, an adapter over it, `texts.txt` and `tasks`."""
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder)
    return folder


@pytest.fixture
def settings(place, tmp_path):
    """LLM2Vec's settings for SimCSE, with a model, data and steps that fit a test."""
    here = {
        "model_name_or_path": str(place / "model"),
        "peft_model_name_or_path": str(place / "mntp"),
        "dataset_file_path": str(place / "texts.txt"),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "attn_implementation": "sdpa",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    small = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "stop_after_n_steps": 3,
        "torch_dtype": "float32",
    }
    return published("simcse/Llama2") | here | small


@pytest.fixture
def supervised(settings, place):
    """The same for a folder of two tasks, with rows of three texts and no instructions."""
    del settings["simcse_dropout"], settings["loss_scale"]
    return settings | {"dataset_name": "mine", "dataset_file_path": str(place / "tasks")}


@pytest.fixture
def ids_read(monkeypatch):
    """The token ids of every text that a model gets, without padding."""
    from sentence_transformers.base.modules import Transformer

    seen = []
    forward = Transformer.forward

    def recorded(self, features, **kwargs):
        masks = features["attention_mask"].bool()
        seen.extend(ids[mask].tolist() for ids, mask in zip(features["input_ids"], masks))
        return forward(self, features, **kwargs)

    monkeypatch.setattr(Transformer, "forward", recorded)
    return seen
