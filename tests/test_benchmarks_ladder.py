"""`python -m benchmarks.ladder`: end to end on a tiny random model, and its own arithmetic."""

import contextlib
import importlib.util
import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from .helpers.explicit_masks import sink_masks, under
from .helpers.simcse_runs import write_pairs
from .helpers.tiny_models import save_llama
from .helpers.words import make_tokenizer

pytest.importorskip("sentence_transformers", "6", reason="the ladder needs the extra [simcse]")
pytest.importorskip("peft", reason="the ladder needs the extra [simcse]")
if importlib.util.find_spec("sklearn") is None:
    pytest.skip("scikit-learn is not installed", allow_module_level=True)

WORDS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model`, a tiny causal Llama, and `data` with a little of everything."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model", make_tokenizer(WORDS), num_hidden_layers=3, initializer_range=0.2)
    for kind in ("sts", "words", "qa"):
        (folder / "data" / kind).mkdir(parents=True)
    for seed, name in enumerate(("x-dev", "x-test", "sts2012", "sts2013")):
        write_pairs(folder / "data" / "sts" / f"{name}.csv", count=30, seed=seed)
    rng = random.Random(0)
    for part in ("dev", "test"):
        _write_words(folder / "data" / "words", part, rng)
    _write_questions(folder / "data" / "qa" / "q.json", rng)
    paragraphs = [" ".join(f"W{_text(rng, 6)}." for _ in range(3)) for _ in range(400)]
    (folder / "data" / "texts.txt").write_text("\n".join(paragraphs))
    return folder


def _text(rng, count):
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(count))


def _write_words(folder, part, rng):
    """Of six words: a word's tag is whether the next one is of the first three, and the word 0 is a name."""
    tagged, names = [], []
    for _ in range(80):
        words = [rng.randrange(6) for _ in range(rng.randrange(4, 8))]
        rows = []
        for i, (word, after) in enumerate(zip(words, [*words[1:], 6]), 1):
            tag = "NOUN" if after < 3 else "VERB"
            rows.append(f"{i}\tw{word}\t_\t{tag}\t_\t_\t{i - 1}\t{'root' if i == 1 else 'dep:x'}\t_\t_")
        tagged.append("\n".join([f"# text = {' '.join(f'w{w}' for w in words)}", *rows]))
        names.append("\n".join(f"{i}\tw{w}\t{'O' if w else 'B-PER'}\t-\t-" for i, w in enumerate(words, 1)))
    (folder / f"a-{part}.conllu").write_text("\n\n".join(tagged) + "\n")
    (folder / f"b-{part}.iob2").write_text("\n\n".join(names) + "\n")


def _write_questions(path, rng):
    """The question is a part of its paragraph."""
    articles = []
    for _ in range(6):
        contexts = [_text(rng, 20) for _ in range(3)]
        paragraphs = [{"context": c, "qas": [{"question": " ".join(c.split()[3:9])}]} for c in contexts]
        articles.append({"title": "", "paragraphs": paragraphs})
    path.write_text(json.dumps({"data": articles}))


def run(place, out, *flags):
    from benchmarks.ladder.__main__ import main

    main(["--model", str(place / "model"), "--data", str(place / "data"), "--out", str(out), *flags])


@pytest.fixture(scope="module")
def untrained(place, tmp_path_factory):
    """A folder in which the untrained rows are measured."""
    out = tmp_path_factory.mktemp("out")
    run(place, out)
    return out


def test_the_untrained_rows_have_tables_and_are_measured_once(place, untrained, capsys, monkeypatch):
    from benchmarks.ladder import retrieval, sentences, words

    for task in (retrieval, sentences, words):
        monkeypatch.setattr(task, "open_row", lambda plan, row: pytest.fail(f"{row} was measured again"))
    run(place, untrained)
    said = capsys.readouterr().out
    for task in ("sentences", "words", "retrieval"):
        assert (untrained / f"{task}.md").read_text().strip() in said
    assert "| untrained, bidirectional, 1 sink token, hidden from the last layer | <" in said
    assert "| untrained, upper layers opened | " in said and "| untrained, causal + next state | " in said
    assert "| untrained, sinkless, of untrained, causal | " in said


def test_what_the_next_word_tells_is_read_from_opened_states_and_from_the_next_state_alone(untrained):
    def right(file, line=""):
        each = json.loads((untrained / "words" / f"untrained-{file}-0.json").read_text())[line]["part of speech"]
        counts = np.array(each["counts"])
        assert (counts[:, 1] == counts[:, 2]).all()
        return 100 * counts[:, 0].sum() / counts[:, 2].sum()

    assert right("causal") + 15 < right("causal", "causal + next state")  # which holds the next word itself
    assert right("causal") + 2 < right("opened")  # a random model, which mixes all words


def test_a_paragraph_is_found_by_the_words_of_its_question(untrained):
    found = json.loads((untrained / "retrieval" / "untrained-causal-0.json").read_text())["MaxSim"]
    assert len(found["ranks"]) == 9 and np.mean(np.array(found["ranks"]) == 1) > 0.5


def test_the_upper_layers_are_opened_and_see_no_first_token(place):
    """Beside the layers called one by one under explicit masks."""
    from benchmarks.ladder.sentences import UpperOpened
    from bidirect_patch.cli.sweep.model import Source, load_model
    from bidirect_patch.cli.sweep.parts import take_apart
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.setups import SINK

    ids = torch.tensor([[1, 7, 8, 9, 10]])
    parts = take_apart(load_model(Source(str(place / "model"))), ids)
    embeddings = UpperOpened(parts, SINK, [ids[0].tolist()], None, [Depth(0, 2), Depth(0, 3)], start=1)
    with torch.no_grad():
        found = dict(embeddings.states(ids, torch.ones_like(ids)))
        plain = load_model(Source(str(place / "model"), attn_implementation="eager"))
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        masks = [causal, *sink_masks(5, 2, sinkless=2)]
        with under(plain.layers, masks):
            expected = plain(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found[Depth(0, 3)][:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.fixture
def in_process(monkeypatch):
    """The commands run here: a new process each would import torch again."""
    from benchmarks.ladder import training
    from bidirect_patch.cli import main

    def run(line, env, stdout, stderr):
        assert line[:3] == (sys.executable, "-m", "bidirect_patch") and env["PYTHONPATH"]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            return SimpleNamespace(returncode=main(list(line[3:])))

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run, STDOUT=None))


@pytest.mark.slow
def test_trained_rows_and_a_teacher(place, untrained, tmp_path, capsys, in_process):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    teacher = str(tmp_path / "teacher")
    words = StaticEmbedding(AutoTokenizer.from_pretrained(place / "model"), embedding_dim=12)
    SentenceTransformer(modules=[words], device="cpu").save_pretrained(teacher)
    rows = ("--rows", "MNTP + neighbours, sink", "teacher, causal")
    few = ("--layers", "2", "--steps", "2", "--mntp_steps", "2", "--teacher", teacher)
    run(place, untrained, "--tasks", "sentences", *rows, *few)
    said = capsys.readouterr().out
    assert "| MNTP + neighbours, sink | " in said and "of 2 layers" in said
    assert "| teacher, causal | as it was saved | " in said and "| the teacher itself |" in said
    assert "| MNTP + neighbours, sink, of untrained, bidirectional, 1 sink token | " in said
    settings = json.loads((untrained / "trained" / "MNTP-neighbours-sink-0.json").read_text())
    assert settings["peft_model_name_or_path"].endswith("MNTP-sink-0") and settings["num_sink_tokens"] == 1
    run(place, untrained, "--tasks", "words", "--rows", "MNTP, sink", *few)
    assert "| MNTP, sink | part of speech: " in capsys.readouterr().out


@pytest.mark.slow
def test_tagging_is_trained_and_read_as_the_command_wrote_it(place, tmp_path, capsys, in_process):
    pytest.importorskip("seqeval", reason="F1 of spans needs the extra [words]")
    few = ("--layers", "2", "--tagging_steps", "20", "--mntp_steps", "1")
    run(place, tmp_path, "--tasks", "tagging", "--rows", "MNTP, sink", *few)
    assert "| MNTP, sink | relation: 2 layers, 20 steps; names: 2 layers, 20 steps | " in capsys.readouterr().out
    found = json.loads((tmp_path / "tagging" / "MNTP-sink-0.json").read_text())[""]
    for task, metric in (("names", "f1"), ("relation", "accuracy")):
        results = json.loads((tmp_path / "tagging" / "trained" / f"{task}-MNTP-sink-0" / "all_results.json").read_text())
        assert found[task]["value"] == pytest.approx(100 * results[f"test_{metric}"], abs=0.01)
        assert 20 < found[task]["value"]


@pytest.mark.slow
def test_a_curve_reads_the_checkpoints_of_one_run(place, tmp_path, capsys, in_process):
    points = ("--curve_tokens", "2048", "6144", "--mlm_probability", "0.5")
    run(place, tmp_path, "--tasks", "curve", "--layers", "2", "--rows", "MNTP, sink", "neighbours, sink", *points)
    said = capsys.readouterr().out
    assert "| MNTP, sink, 6,144 | 6,144 | 6 | " in said and "| MNTP, sink, 6,144, of MNTP, sink, 0 | " in said
    mntp, neighbours = (json.loads((tmp_path / "curve" / f"{name}-sink-0.json").read_text()) for name in ("MNTP", "neighbours"))
    assert list(mntp) == ["0", "2048", "6144"] and [line["steps"] for line in mntp.values()] == [0, 2, 6]
    losses = [line["loss"] for line in mntp.values()]
    assert losses[0] > losses[1] > losses[2]  # the same tokens are hidden each time
    assert mntp["0"]["cosines"] == neighbours["0"]["cosines"] != mntp["2048"]["cosines"] != mntp["6144"]["cosines"]
    # A step of neighbours reads 64 texts, of six words each and one token before them.
    every = neighbours["2048"]["steps"]
    assert every == round(2048 / (64 * 7)) and neighbours["6144"]["steps"] == 3 * every and neighbours["0"]["loss"] is None


@pytest.mark.slow
def test_halved_weights_are_the_mean_of_those_before_and_after(place, tmp_path, in_process):
    from benchmarks.ladder.opened import open_row
    from benchmarks.ladder.rows import Row
    from benchmarks.ladder.texts import write_training_texts
    from benchmarks.ladder.training import Plan
    from bidirect_patch.cli.sweep.model import Source

    write_training_texts(place / "data", tmp_path / "texts")
    plan = Plan(Source(str(place / "model"), torch_dtype="float32"), 2, "<s>", tmp_path, 1, 3, 3, 0.3, 1, None, False, print)
    before, halved, after = (open_row(plan, Row(name, "sink")).parts.model for name in ("untrained", "MNTP halved", "MNTP"))
    names = [name for name, _ in after.named_parameters() if "q_proj" in name]
    assert len(names) == 2
    for name in names:
        one, half, two = (model.get_parameter(name) for model in (before, halved, after))
        assert not torch.equal(one, two)
        torch.testing.assert_close(half, (one + two) / 2)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--rows", "no such"], "no row 'no such'; give a recipe"),
        (["--rows", "teacher"], "need --teacher"),
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--curve_tokens", "100", "250"], "each has to be a multiple of the first"),
    ],
)
def test_flags_that_do_not_fit(place, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        run(place, tmp_path, *flags)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_a_command_that_fails_is_an_error_with_its_log(tmp_path):
    """A command in a process of its own, as they all are run."""
    from benchmarks.ladder import training

    with pytest.raises(RuntimeError, match="failed with 2: see .*x.log"):
        training.run("no-such-command", {}, tmp_path / "x", print)
    assert "no-such-command" in (tmp_path / "x.log").read_text()
    assert not (tmp_path / "x.seconds.json").exists()


def test_names_are_counted_as_spans():
    from benchmarks.ladder.words import counts, score, spans

    assert list(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])) == [(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "LOC")]
    true = np.array(["B-PER", "I-PER", "O", "B-LOC", "O"])
    given = np.array(["B-PER", "O", "O", "B-LOC", "B-LOC"])
    found = counts(given, true, np.array([0, 0, 0, 1, 1]), "names")
    assert found.tolist() == [[0, 1, 1], [1, 2, 1]]
    assert score(found) == pytest.approx(40)  # one of three given and one of two true


def test_words_are_found_in_their_sentence(tmp_path):
    from benchmarks.ladder.texts import tagged_sentences

    rows = "1-2\tcan't\t_\t_\t_\t_\t_\t_\t_\t_\n1\tca\t_\tAUX\t_\t_\t3\taux\t_\t_\n2\tn't\t_\tPART\t_\t_\t3\tadvmod\t_\t_\n"
    rows += "3\tgo\t_\tVERB\t_\t_\t0\troot\t_\t_\n3.1\tx\t_\t_\t_\t_\t_\t_\t_\t_\n"
    (tmp_path / "dev.conllu").write_text(f"# text = can't go\n{rows}\n# text = other\n{rows}")
    one, two = tagged_sentences(tmp_path, "dev")
    assert one.text == "can't go" and one.spans == [(0, 2), (2, 5), (6, 8)]
    assert one.labels["direction of the head"] == ["right", "right", "root"] and "names" not in one.labels
    assert two.text == "ca n't go" and two.spans == [(0, 2), (3, 6), (7, 9)]


def test_ranks():
    from benchmarks.ladder.retrieval import ranks, reciprocal

    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.1]])
    assert ranks(scores, np.array([2, 0])).tolist() == [2, 2]
    assert reciprocal(np.array([1, 4, 11])).tolist() == [1, 0.25, 0]


def test_a_line_is_set_beside_another_on_the_same_draws():
    from benchmarks.ladder import tables
    from benchmarks.ladder.rows import Row

    generator = np.random.default_rng(0)
    scores = {name: generator.normal(size=60) for name in ("x-test", "sts2012", "sts2013")}

    def line(noise):
        cosines = {name: (own + noise * generator.normal(size=60)).tolist() for name, own in scores.items()}
        return {"": {"how": "a way", "dev": 50.0, "cosines": cosines}}

    results = {Row("neighbours", "causal"): line(2)} | {Row("neighbours", "sink", seed): line(0.1) for seed in (0, 1)}
    text = tables.sentences(results, scores, None).splitlines()
    assert text[0] == "|  | how it is read | dev | x-test | STS12-16 |"
    values, *_ = text[3].split(" | ")[3:]
    assert float(values.split()[0]) > 95
    ahead = next(row for row in text if row.startswith("| neighbours, sink, of neighbours, causal | "))
    assert all(float(cell.split("[")[1].split(",")[0]) > 0 for cell in ahead.split(" | ")[1:3])
