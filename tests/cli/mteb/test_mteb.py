"""`bidirect-patch mteb` on tasks of our own, over local files: against the encoder called by itself."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from bidirect_patch import load_llm2vec
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.cli import main

from ...helpers.llm2vec_folders import write_adapter, write_base
from ...helpers.sentences import write_folder

st = pytest.importorskip("sentence_transformers", "6", reason="mteb needs the extra [mteb]")
pytest.importorskip("peft", reason="mteb needs the extra [mteb]")


def mteb():
    return pytest.importorskip("mteb", reason="mteb isn't installed: the extra [mteb]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model`, a decoder; `encoder`, trained from it with a sink token; `pairs.csv`; `base` and `adapter` as LLM2Vec has them."""
    folder = tmp_path_factory.mktemp("mteb")
    write_folder(folder)
    (folder / "of_llm2vec").mkdir()
    write_pairs_of([f"w{i}" for i in range(60)], folder / "pairs.csv")
    write_pairs_of(
        "the cat sat on mat dogs find fact has space before and after it found".split(),
        folder / "of_llm2vec" / "pairs.csv",
    )
    train = [
        "--model_name_or_path",
        str(folder / "model"),
        "--dataset_file_path",
        str(folder / "texts.txt"),
        "--do_train",
    ]
    how = ["--num_sink_tokens", "1", "--max_steps", "1", "--use_cpu", "--report_to", "none", "--save_strategy", "no"]
    assert (
        main(["simcse", *train, *how, "--output_dir", str(folder / "encoder"), "--cache_dir", str(folder / "cache")])
        == 0
    )
    write_base(folder / "base")
    write_adapter(folder / "adapter", folder / "base")
    return folder


def write_pairs_of(words, path):
    """Pairs of which no two have the same cosine but for rounding."""
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(words, k=rng.randrange(3, 9))) for _ in range(2)] for _ in range(30)]
    path.write_text("sentence1,sentence2,score\n" + "".join(f"{a},{b},{rng.random():.3f}\n" for a, b in texts))


def spearman_of(encode, path):
    from scipy.stats import spearmanr

    rows = [line.split(",") for line in Path(path).read_text().splitlines()[1:]]
    one, two = (np.asarray(encode([row[i] for row in rows])) for i in (0, 1))
    cosines = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    return spearmanr(cosines, [float(row[2]) for row in rows]).statistic


def evaluated(out, *flags):
    """The result of the one task, as mteb reads it."""
    package = mteb()
    assert main(["mteb", *map(str, flags), "--output_dir", str(out)]) == 0
    (path,) = Path(out, "results").glob("*/*/pairs.json")
    return package.TaskResult.from_disk(path), path


def test_an_encoder_of_this_package_with_its_sinks(place, tmp_path, capsys):
    result, path = evaluated(tmp_path, place / "encoder", "--tasks", place / "pairs.csv")
    with opening_sinks():
        encoder = st.SentenceTransformer(str(place / "encoder"), device="cpu")
    from bidirect_patch import enable_bidirectional

    expected = spearman_of(enable_bidirectional(encoder, num_sink_tokens=1).encode, place / "pairs.csv")
    assert result.get_score() == pytest.approx(expected, abs=1e-4)
    assert path.parent.parent.name == "encoder" and f"{100 * expected:.1f}" in capsys.readouterr().out
    assert json.loads((path.parent / "model_meta.json").read_text())["name"] == "encoder"


@pytest.mark.parametrize("instruction", [None, "Find the same words"])
def test_an_encoder_of_llm2vec_gets_the_instruction_of_the_task(place, tmp_path, instruction):
    """By default mteb's for the kind of task, with LLM2Vec's colon; else that of LLM2Vec's file."""
    flags = []
    if instruction:
        (tmp_path / "instructions.json").write_text(json.dumps({"pairs": instruction, "Other": "x"}))
        flags = ["--task_to_instructions_fp", tmp_path / "instructions.json"]
    adapter = ["--peft_model_name_or_path", place / "adapter"]
    pairs = place / "of_llm2vec" / "pairs.csv"
    result, path = evaluated(tmp_path / "out", place / "base", *adapter, "--tasks", pairs, *flags)
    prompt = f"{instruction}:" if instruction else "Retrieve semantically similar text:"
    encoder = load_llm2vec(place / "base", place / "adapter")
    expected = spearman_of(lambda texts: encoder.encode(texts, prompt=prompt), pairs)
    assert result.get_score() == pytest.approx(expected, abs=1e-4)
    assert path.parent.parent.name == "adapter"


def test_the_settings_of_a_sweep(place, tmp_path):
    from bidirect_patch.cli.simcse.model import load_encoder
    from bidirect_patch.cli.simcse.settings import EncoderArguments

    settings = {
        "model_name_or_path": str(place / "model"),
        "num_sink_tokens": 1,
        "layers": 1,
        "pooling_mode": "weighted_mean",
    }
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "settings.json").write_text(json.dumps(settings))
    result, path = evaluated(tmp_path / "out", tmp_path / "swept" / "settings.json", "--tasks", place / "pairs.csv")
    encoder, _ = load_encoder(EncoderArguments(**settings, simcse_dropout=0.0, lora_r=0), {})
    assert result.get_score() == pytest.approx(spearman_of(encoder.encode, place / "pairs.csv"), abs=1e-4)
    assert path.parent.parent.name == "swept"
    (place / "model" / "config.json").touch()  # another model, for all that is known
    flags = ["mteb", str(tmp_path / "swept" / "settings.json"), "--tasks", str(place / "pairs.csv")]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert len(list(Path(tmp_path, "out", "results", "swept").glob("*/pairs.json"))) == 2


def test_what_is_there_already_is_taken_and_another_encoder_of_that_name_is_not(place, tmp_path, monkeypatch):
    import shutil

    mteb()
    folder = shutil.copytree(place / "encoder", tmp_path / "encoder")
    flags = [folder, "--tasks", place / "pairs.csv"]
    evaluated(tmp_path / "out", *flags)
    calls = []
    encode = st.SentenceTransformer.encode
    monkeypatch.setattr(st.SentenceTransformer, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    evaluated(tmp_path / "out", *flags)
    assert not calls
    evaluated(tmp_path / "out", *flags, "--overwrite")
    assert calls
    del calls[:]
    (folder / "model.safetensors").touch()
    assert main(["mteb", *map(str, flags), "--output_dir", str(tmp_path / "out")]) == 0
    assert calls and len(list(Path(tmp_path, "out", "results").glob("*/*/pairs.json"))) == 2


def test_instructions_stand_before_queries_and_not_before_documents():
    """And only where the encoder has some: as this package's training writes them, or as LLM2Vec does."""
    mteb()
    from types import SimpleNamespace

    from mteb.types import PromptType

    from bidirect_patch.cli.mteb.evaluation import InstructedEncoder
    from bidirect_patch.cli.mteb.model import Encoder, _llm2vec
    from bidirect_patch.cli.simcse.instructions import as_prompt

    given = SimpleNamespace(encode=lambda texts, prompt, **kwargs: (texts, prompt))
    task = SimpleNamespace(name="Mine", type="Retrieval", prompt={"query": "Of mteb."})
    batches = [{"text": ["a", "b"]}, {"text": ["c"]}]

    def prompt(instructions, kind, write=as_prompt):
        encoder = InstructedEncoder(Encoder(given, "x", True, write), instructions, "1")
        texts, found = encoder.encode(batches, task_metadata=task, hf_split="test", hf_subset="x", prompt_type=kind)
        assert texts == ["a", "b", "c"]
        return found

    assert prompt({"Mine": "Of the file:"}, PromptType.query) == "Of the file:; "
    assert prompt({"Mine": "Of the file:"}, PromptType.query, _llm2vec) == "Of the file:"
    assert prompt({}, PromptType.query, _llm2vec) == "Of mteb:"
    assert prompt({"Mine": "Of the file:"}, PromptType.document) is None
    assert prompt(None, PromptType.query) is None and prompt(None, None) is None


@pytest.mark.parametrize(
    "flags, says",
    [
        (["model", "--tasks", "pairs.csv"], "model is neither an encoder of sentence-transformers nor one of LLM2Vec"),
        (["encoder", "--tasks", "NoSuchTask"], "mteb has no task 'NoSuchTask'"),
        (["encoder", "--tasks", "nowhere.csv"], "no .csv or .jsonl file 'nowhere.csv': give tasks"),
        (["encoder", "--tasks", "STS16"], "can't get the data of STS16"),
        (["nowhere", "--tasks", "pairs.csv"], "nowhere is neither"),
        (["nowhere.json", "--tasks", "pairs.csv"], "no settings file 'nowhere.json'"),
        (["wrong.json", "--tasks", "pairs.csv"], "wrong.json: 'poling_mode' is no setting of an encoder"),
        (
            ["encoder", "--tasks", "pairs.csv", "--task_to_instructions_fp", "listed.json"],
            "the instruction of pairs is a string",
        ),
        (
            ["encoder", "--tasks", "pairs.csv", "--peft_model_name_or_path", "adapter"],
            "encoder is a whole encoder already",
        ),
        (["encoder", "--tasks", "pairs.csv", "--batch_size", "0"], "batch_size must be at least 1; got 0"),
        (["encoder"], "--tasks"),
    ],
)
def test_bad_input(place, tmp_path, monkeypatch, capsys, flags, says):
    mteb()
    monkeypatch.chdir(place)
    Path("wrong.json").write_text('{"poling_mode": "mean"}')
    Path("listed.json").write_text('{"pairs": ["a"]}')
    assert main(["mteb", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bidirect-patch: error:") and says in error


def test_an_adapter_with_sinks_is_not_opened_without_them(place, tmp_path, capsys):
    mteb()
    train = [
        "--model_name_or_path",
        str(place / "model"),
        "--train_file",
        str(place / "texts.txt"),
        "--do_train",
        "--use_cpu",
    ]
    how = [
        "--num_sink_tokens",
        "1",
        "--max_steps",
        "1",
        "--report_to",
        "none",
        "--mask_token_type",
        "eos",
        "--line_by_line",
    ]
    assert main(["mntp", *train, *how, "--output_dir", str(tmp_path / "mntp"), "--save_strategy", "no"]) == 0
    flags = ["--tasks", str(place / "pairs.csv"), "--output_dir", str(tmp_path / "out")]
    assert main(["mteb", str(tmp_path / "mntp"), *flags]) == 2
    assert "was trained with sink tokens, which LLM2Vec lacks" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert main(["mteb", "model", "--tasks", "STS16", "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "bidirect-patch: error: mteb needs mteb: pip install 'bidirect-patch[mteb]'\n"
