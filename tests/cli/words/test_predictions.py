"""What `bidirect-patch words` writes for the words of `test_file`, however training reads its own sentences."""

import json
import time
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from ...helpers.processes import in_two_ranks
from ...helpers.word_runs import HAS_CLASSES, results, run, sentences

pytest.importorskip("accelerate", reason="the training commands need the extra [train]")
pytest.importorskip("datasets", reason="the training commands need the extra [train]")
pytest.importorskip("peft", reason="the training commands need the extra [train]")
if not HAS_CLASSES:
    pytest.skip("this transformers has no LlamaForTokenClassification", allow_module_level=True)

FIGURES = [f"{split}_{name}" for split in ("eval", "test") for name in ("loss", "accuracy", "words")]


@pytest.fixture(scope="module")
def tested(place, tmp_path_factory):
    """The settings that evaluate a trained model in batches of 5, of 24 sentences."""
    folder = tmp_path_factory.mktemp("tested")
    common = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "cache_dir": str(folder / "cache")}
    train = {"model_name_or_path": str(place / "model"), "train_file": str(place / "train.conllu"), "do_train": True}
    train |= {"learning_rate": 0.05, "max_steps": 60, "save_strategy": "no", "output_dir": str(folder / "model")}
    assert run(common | train) == 0
    files = {"validation_file": str(place / "dev.conllu"), "test_file": str(place / "test.conllu"), "do_eval": True}
    return common | files | {"model_name_or_path": train["output_dir"], "per_device_eval_batch_size": 5}


def predictions(settings):
    path = Path(settings["output_dir"]) / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def expected(tested, tmp_path):
    """The settings, predictions and figures of a run that asks for nothing else. The labels are mostly right."""
    settings = tested | {"output_dir": str(tmp_path / "plain")}
    assert run(settings) == 0
    found = predictions(settings)
    pairs = [pair for one, row in zip(found, sentences(24, seed=2)) for pair in zip(one["labels"], row["pos_tags"])]
    assert sum(label == right for label, right in pairs) / len(pairs) == results(settings)["test_accuracy"] > 0.8
    return settings, found, results(settings)


@pytest.mark.parametrize("change", [{"group_by_length": True}, {"dataloader_drop_last": True}], ids=lambda change: min(change))
def test_each_sentence_keeps_its_own_labels(expected, tmp_path, change):
    settings, found, figures = expected
    settings = settings | change | {"output_dir": str(tmp_path / "out")}
    assert run(settings) == 0
    assert predictions(settings) == found
    assert all(results(settings)[name] == pytest.approx(figures[name], rel=1e-5) for name in FIGURES)


@pytest.mark.skipif(
    "dataloader_in_order" not in {field.name for field in fields(TrainingArguments)},
    reason="this transformers always reads batches in their order",
)
def test_a_batch_that_is_ready_late_keeps_its_place(expected, tmp_path, monkeypatch):
    from bidirect_patch.cli.words import training

    class SlowAtFirst(training.WordCollator):
        def __call__(self, rows):
            time.sleep(0.5 * (rows[0]["sentence"] == 0))
            return super().__call__(rows)

    monkeypatch.setattr(training, "WordCollator", SlowAtFirst)
    settings, found, _ = expected
    settings = settings | {"dataloader_in_order": False, "dataloader_num_workers": 2, "output_dir": str(tmp_path / "out")}
    assert run(settings) == 0
    assert predictions(settings) == found


@pytest.mark.parametrize("drops, steps", [(False, 3), (True, 2)])
def test_training_alone_drops_the_rest(settings, place, drops, steps):
    settings |= {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 50, "dataloader_drop_last": drops}
    settings |= {"test_file": str(place / "test.conllu"), "per_device_eval_batch_size": 5}
    assert run(settings) == 0
    state = json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())
    assert state["global_step"] == steps
    assert not any("_" in row["labels"] for row in predictions(settings))


@pytest.mark.slow
def test_two_processes_write_what_one_does(expected, tmp_path):
    settings, found, figures = expected
    settings = settings | {"group_by_length": True, "dataloader_drop_last": True, "output_dir": str(tmp_path / "out")}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    in_two_ranks("-m", "bidirect_patch", "words", path)
    assert predictions(settings) == found
    assert all(results(settings)[name] == pytest.approx(figures[name], rel=1e-5) for name in FIGURES)
