"""What can't be measured or written: one line, exit code 2, and no model is loaded."""

import pytest

from bidirect_patch.cli import main

from ...helpers.simcse_runs import BAD_PAIRS, write_pairs

pytest.importorskip("datasets", reason="the command needs the extra [train]")


@pytest.fixture
def refused(capsys, monkeypatch):
    """The line that a run says which is refused before a tokenizer or a model is loaded."""
    from bidirect_patch.cli.sweep import steps

    for name in ("load_tokenizer", "load_model"):
        monkeypatch.setattr(steps, name, lambda *args: pytest.fail("a model was loaded"))

    def refused(*argv):
        assert main(["sweep", *map(str, argv)]) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line]
        assert lines[-1].startswith("bidirect-patch: error: ") and "Traceback" not in captured.err and captured.out == ""
        return lines[-1]

    return refused


@pytest.mark.parametrize("text, says", [*BAD_PAIRS, ("", "can't read")])
@pytest.mark.parametrize("flag", ["--eval_sts", "--test_file"])
def test_pairs_that_cannot_be_used(refused, place, tmp_path, text, says, flag):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    files = {"--eval_sts": place / "dev.csv", flag: path}
    assert says in refused(place / "model", *(word for pair in files.items() for word in pair))


def test_too_few_pairs(refused, place, tmp_path):
    write_pairs(tmp_path / "few.csv", count=19)
    assert "holds 19 pairs, too few: eval_sts needs 20 at least" in refused(place / "model", "--eval-sts", tmp_path / "few.csv")


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "--eval_sts"),
        (["--eval_sts", "nowhere.csv"], "no .csv or .jsonl file 'nowhere.csv': give eval_sts"),
        (["--eval_sts", "DEV", "--test_file", "nowhere.csv"], "no .csv or .jsonl file 'nowhere.csv': give test_file"),
        (["--eval_sts", "DEV", "--torch_dtype", "int8"], "--torch_dtype"),
        (["--eval_sts", "a\0b.csv"], "eval_sts holds a character"),
        (["--eval_sts", "DEV", "--nonsense"], "--nonsense"),
    ],
)
def test_flags_that_cannot_be_used(refused, place, flags, says):
    assert says in refused(place / "model", *(place / "dev.csv" if word == "DEV" else word for word in flags))


def test_a_folder_that_is_not_empty(refused, place, tmp_path):
    (tmp_path / "file").write_text("mine")
    flags = ("--eval_sts", place / "dev.csv", "--output_dir")
    assert "is there already and is not empty" in refused(place / "model", *flags, tmp_path)
    assert "is a file" in refused(place / "model", *flags, tmp_path / "file")


def test_a_model_that_is_not_there(place, capsys):
    assert main(["sweep", str(place / "nothing"), "--eval_sts", str(place / "dev.csv")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bidirect-patch: error: ")


def test_weights_that_are_no_numbers(place, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path)
    assert main(["sweep", str(tmp_path), "--eval_sts", str(place / "dev.csv")]) == 2
    assert "no setup gives embeddings that are numbers" in capsys.readouterr().err
