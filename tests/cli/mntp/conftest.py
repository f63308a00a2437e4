"""Fixtures of the tests of `bidirect-patch mntp`."""

import random

import pytest

from ...helpers.tiny_models import save_llama
from ...helpers.words import make_tokenizer

WORDS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `model`, a tiny causal Llama and its tokenizer, and `text`, where a word tells the next one."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model", make_tokenizer(WORDS, model_max_length=256))
    rng = random.Random(0)
    lines = [" ".join(f"w{(i * 7 + j) % WORDS}" for j in range(rng.randrange(3, 30))) for i in range(300)]
    lines[5] = ""
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text("\n".join(lines[:260]) + "\n")
    (folder / "text" / "validation.txt").write_text("\n".join(lines[260:]) + "\n")
    return folder


@pytest.fixture
def settings(place, tmp_path):
    return {
        "model_name_or_path": str(place / "model"),
        "train_file": str(place / "text" / "train.txt"),
        "validation_file": str(place / "text" / "validation.txt"),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "max_seq_length": 32,
        "mlm_probability": 0.2,
        "learning_rate": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
