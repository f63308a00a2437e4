"""Evaluation on pairs of sentences with scores."""

import json
from pathlib import Path

import pytest
from torch.nn.functional import cosine_similarity

from ...helpers.simcse_runs import BAD_PAIRS, run, write_pairs

st = pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
spearmanr = pytest.importorskip("scipy.stats", reason="the contrastive step needs the extra [simcse]").spearmanr
pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")


@pytest.fixture
def evaluated(settings, tmp_path):
    """Settings with pairs to evaluate on every second step."""
    write_pairs(tmp_path / "pairs.jsonl")
    settings |= {"validation_file": str(tmp_path / "pairs.jsonl"), "eval_strategy": "steps", "eval_steps": 2}
    return settings | {"stop_after_n_steps": 5, "gradient_checkpointing": False, "num_train_epochs": 3}


def spearman(folder, rows):
    """The correlation by the definition: of the scores with the cosines of what the saved encoder gives."""
    encoder = st.SentenceTransformer(folder, device="cpu")
    one, two = (encoder.encode([row[name] for row in rows], convert_to_tensor=True) for name in ("sentence1", "sentence2"))
    return spearmanr([row["score"] for row in rows], cosine_similarity(one, two).numpy())[0]


def results(settings):
    return json.loads(Path(settings["output_dir"], "all_results.json").read_text())


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_before_on_schedule_and_after_with_a_table_at_the_end(evaluated, place, tmp_path, capsys, ending):
    """Texts that are longer than max_seq_length are read to the end, as the saved encoder reads them."""
    path = tmp_path / f"pairs.{ending}"
    rows = write_pairs(path)
    evaluated |= {"validation_file": str(path), "max_seq_length": 4, "peft_model_name_or_path": None}
    assert run(evaluated) == 0
    found = results(evaluated)
    assert found["eval_spearman_cosine"] == pytest.approx(spearman(evaluated["output_dir"], rows), abs=1e-4)
    assert found["before_spearman_cosine"] != found["eval_spearman_cosine"]
    table = capsys.readouterr().out.split("contrastive training\n")[-1].splitlines()
    assert table[0].split() == ["Spearman"]
    assert [line[:28].strip() for line in table[1:5]] == ["before training", "step 2", "step 4", "after 5 steps"]
    assert table[4].split()[-1] == f"{found['eval_spearman_cosine']:.1%}"


@pytest.mark.parametrize("cast", [{}, {"bf16_full_eval": True}], ids=str)
def test_training_is_the_same_with_and_without_evaluation(evaluated, tmp_path, cast):
    from safetensors.torch import load_file

    without = {k: v for k, v in evaluated.items() if k not in ("validation_file", "eval_strategy", "eval_steps")}
    without["output_dir"] = str(tmp_path / "without")
    assert run(evaluated | cast) == run(without) == 0
    one, two = (load_file(Path(s["output_dir"], "model.safetensors")) for s in (evaluated, without))
    assert all((one[name] == two[name]).all() for name in two)


def test_the_best_model_is_loaded_at_the_end(evaluated):
    """Training that goes astray: the checkpoint with the highest correlation is what is written."""
    evaluated |= {"load_best_model_at_end": True, "save_steps": 2, "learning_rate": 0.3, "save_total_limit": 2}
    evaluated |= {"stop_after_n_steps": 8, "weight_decay": 0.0}
    assert run(evaluated) == 0
    state = json.loads(Path(evaluated["output_dir"], "trainer_state.json").read_text())
    scores = {e["step"]: e["eval_spearman_cosine"] for e in state["log_history"] if "eval_spearman_cosine" in e}
    best = max(list(scores)[:-1], key=scores.get)
    rows = [json.loads(line) for line in Path(evaluated["validation_file"]).read_text().splitlines()]
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    written = spearman(evaluated["output_dir"], rows)
    assert min(scores, key=lambda step: abs(scores[step] - written)) == best  # merging rounds a little
    assert max(scores.values()) - min(scores.values()) > 0.01


def test_evaluation_alone(evaluated, capsys):
    alone = evaluated | {"do_train": False, "dataset_file_path": None}
    assert run(alone) == 0
    assert "as it was loaded" in capsys.readouterr().out
    assert not Path(evaluated["output_dir"], "model.safetensors").exists()


@pytest.mark.parametrize("text, says", BAD_PAIRS)
def test_pairs_that_cannot_be_used(evaluated, tmp_path, capsys, text, says):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    assert run(evaluated | {"validation_file": str(path)}) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"validation_file": "pairs.txt"}, "no .csv or .jsonl file 'pairs.txt'"),
        ({"validation_file": None}, "validation_file is missing"),
        ({"metric_for_best_model": "spearman"}, "must be spearman_cosine or pearson_cosine; got spearman"),
    ],
)
def test_settings_that_cannot_be_used(evaluated, capsys, change, says):
    assert run(evaluated | change) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not Path(evaluated["output_dir"]).exists()
