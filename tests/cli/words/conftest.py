"""Fixtures of the tests of `bidirect-patch words`."""

import pytest

from ...helpers.word_runs import sentences, write_model, write_sentences


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder with `model`, a tiny causal Llama and its tokenizer, and `train`, `dev` and `test` of each kind of file."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "model")
    for seed, (name, count) in enumerate({"train": 120, "dev": 24, "test": 24}.items()):
        rows = list(sentences(count, seed))
        for ending in ("jsonl", "iob2", "conllu", "conll"):
            write_sentences(folder / f"{name}.{ending}", rows)
    return folder


@pytest.fixture
def settings(place, tmp_path):
    return {
        "model_name_or_path": str(place / "model"),
        "train_file": str(place / "train.conllu"),
        "validation_file": str(place / "dev.conllu"),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "do_train": True,
        "learning_rate": 0.05,
        "max_steps": 10,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
