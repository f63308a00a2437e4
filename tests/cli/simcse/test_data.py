"""The examples for training, from files of several kinds."""

import json

import pytest

from bidirect_patch.errors import ConfigError

pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("datasets", reason="the contrastive step needs the extra [simcse]")


def load(path, **options):
    from bidirect_patch.cli.simcse.data import load_examples
    from bidirect_patch.cli.simcse.settings import TextArguments

    cache = path.parent / "cache"
    return load_examples(TextArguments(dataset_file_path=str(path), cache_dir=str(cache), **options))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_trained_on(examples):
    """The rows as the loss takes them, by the name of the task."""
    sets = examples.data if isinstance(examples.data, dict) else {None: examples.data}
    return {name: [tuple(row.values()) for row in rows] for name, rows in sets.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("query", "positive", "negative"),
        ("negative", "positive", "query"),
        ("anchor", "positive"),
        ("positive", "anchor"),
        ("sentence1", "sentence2"),
        ("sent0", "sent1", "hard_neg"),
        ("Query", "Positive", "Negative"),
        ("anchor", "positive", "hard_negative"),
        ("first", "second"),
    ],
)
def test_the_query_is_the_first_column_whatever_the_files_order_is(tmp_path, names):
    """The loss takes the columns by their order, and not by their names."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({name: f"{name} {i}" for name in names}) + "\n" for i in range(3)))
    examples = load(path)
    query = "query" if "query" in names else "anchor" if "anchor" in names else names[0]
    others = [name for name in ("positive", "negative", *names) if name in names and name != query]
    columns = dict(zip(("anchor", "positive", "negative"), (query, *dict.fromkeys(others))))
    assert list(examples.data.column_names) == list(columns) and not examples.single
    assert examples.data[1] == {new: f"{old} 1" for new, old in columns.items()}


def test_a_single_text_is_its_own_positive(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("w1\n\nw2\n")
    data, single, prompts, _ = load(path)
    assert single and not prompts
    assert list(data.column_names) == ["anchor", "positive"]
    assert data[:] == {"anchor": ["w1", "w2"], "positive": ["w1", "w2"]}


@pytest.mark.parametrize(
    "row, trained_on",
    [
        ({"query": "q", "pos": ["p"], "neg": ["n", "m"]}, ("q", "p", "n", "m")),
        ({"neg": ["n"], "pos": ["p"], "query": "q"}, ("q", "p", "n")),
        ({"query": "q", "positive": "p", "negative": ["n", "m"]}, ("q", "p", "n", "m")),
        ({"negative": ["n", "m"], "positive": "p", "anchor": "q"}, ("q", "p", "n", "m")),
        ({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, ("q", "p", "n", "m")),
        ({"query": "q", "positive": "p", "negative": "n", "negative_2": ["m", "l"]}, ("q", "p", "n", "m", "l")),
        ({"query": ["q"], "positive": ["p"], "negative": []}, ("q", "p")),
        ({"query": "q", "positive": "p", "negative": "n", "score": 0.5}, ("q", "p", "n")),
        ({"query_id": "7", "query": "q", "positive": "p", "rank": 1}, ("q", "p")),
        ({"id": "7", "sentence": "t"}, ("t", "t")),
        ({"qid": "7", "query": "q", "positive": "p", "doc-id": "x"}, ("q", "p")),
        ({"text": "t", "label": 1}, ("t", "t")),
    ],
)
def test_formats_that_are_told_by_their_columns(tmp_path, row, trained_on):
    def numbered(value, i):
        if isinstance(value, list):
            return [numbered(one, i) for one in value]
        return f"{value}{i}" if isinstance(value, str) else value

    path = write(tmp_path / "rows.jsonl", [{name: numbered(value, i) for name, value in row.items()} for i in range(3)])
    expected = [tuple(f"{text}{i}" for text in trained_on) for i in range(3)]
    assert texts_trained_on(load(path)) == {None: expected}


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}])
def test_the_loss_takes_every_negative(supervised, tmp_path, monkeypatch, options):
    from sentence_transformers.sentence_transformer import losses

    from ...helpers.simcse_runs import run

    seen = []
    cls = losses.CachedMultipleNegativesRankingLoss if options else losses.MultipleNegativesRankingLoss
    forward = cls.forward

    def recorded(self, sentence_features, labels):
        sentence_features = list(sentence_features)
        seen.append([features["input_ids"].tolist() for features in sentence_features])
        return forward(self, sentence_features, labels)

    monkeypatch.setattr(cls, "forward", recorded)
    rows = [{"neg": [f"w{i + 20}", f"w{i + 30}"], "pos": [f"w{i + 10}"], "query": f"w{i}"} for i in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    small = {"dataset_file_path": str(path), "stop_after_n_steps": 1, "per_device_train_batch_size": 4}
    assert run(supervised | small | {"gradient_checkpointing": False} | options) == 0
    trained_on = sorted(tuple(ids[-1] - 3 for ids in row) for row in zip(*seen[0]))  # a word's id is its number and three more
    assert trained_on == [(i, i + 10, i + 20, i + 30) for i in range(4)]


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"question": "q", "answer": "a", "text": "t"}], "the columns question, answer, text, and of text question, answer"),
        ([{"question": "q", "answer": "a", "topic": "t"}], "simcse takes one column of texts; or query (or anchor"),
        ([{"query": "q", "answer": "a"}], "of text query, answer: simcse takes"),
        ([{"query": "q", "negative": "n"}], "of text query, negative: simcse takes"),
        ([{"query": "q", "positive": "p", "title": "t"}], "take out the others that hold text"),
        ([{"query": "q", "positive": "p", "notes": {"by": "me"}}], "of text query, positive, notes: simcse takes"),
        ([{"query": "q", "positive": "p", "anchor": "a"}], "of text query, positive, anchor: simcse takes"),
        ([{"query": "q", "positive": 3}], "the columns query, positive, and of text query: simcse takes"),
        ([{"id": "q7"}], "the columns id, and of text none: simcse takes"),
        ([{"query": "q", "positive": ["p"]}, {"query": "q", "positive": "p"}], "simcse takes one column"),
        ([{"query": "q", "pos": ["p", "o"]}], "pos holds lists of 2 texts, and simcse takes one text in each row: write a row"),
        (
            [{"query": "q", "pos": ["p"], "neg": ["n"]}, {"query": "q", "pos": ["p"], "neg": ["n", "m"]}],
            "neg holds lists of 1 to 2 texts, and simcse takes a list of the same length in each row",
        ),
        ([{"sentence1": "a", "sentence2": "b", "score": 0.0}], "has score beside two texts"),
        ([{"premise": "a", "hypothesis": "b", "label": 2}], "has label beside two texts"),
        ([{"premise": "a", "hypothesis": "b", "gold_label": "neutral"}], "Pairs with scores are for validation_file"),
        ([{"query": "q", "positive": None}, {"query": None, "positive": "p"}], "no row has query, positive"),
    ],
)
def test_no_column_that_may_be_text_to_train_on_is_left_out(tmp_path, rows, says):
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path / "rows.jsonl", rows))
    assert says in str(refused.value) and "rows.jsonl" in str(refused.value)


def test_rows_that_lack_a_text_are_left_out_with_a_warning(tmp_path, caplog):
    rows = [{"query": f"q{i}", "positive": "p", "negative": "n" if i else None} for i in range(3)]
    examples = load(write(tmp_path / "rows.jsonl", rows))
    assert texts_trained_on(examples) == {None: [("q1", "p", "n"), ("q2", "p", "n")]}
    assert "1 of 3 rows are left out, since they lack one of query, positive, negative" in caplog.text


def test_of_e5_no_row_is_read_twice(tmp_path, caplog):
    """The data hold the parts of a task beside the whole."""
    rows = [{"query": f"q{i}", "positive": "p", "negative": "n"} for i in range(4)]
    for name, some in (("allnli", rows), ("allnli_split1", rows[::2]), ("allnli_split2", rows[1::2]), ("nq", rows)):
        write(tmp_path / f"{name}.jsonl", some)
    examples = load(tmp_path, dataset_name="E5")
    assert {name: len(texts) for name, texts in texts_trained_on(examples).items()} == {"allnli": 2, "allnli_2": 2, "nq": 4}
    assert "allnli_split1.jsonl, allnli_split2.jsonl are left out" in caplog.text


def test_lists_that_many_rows_lack(tmp_path):
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": ["n"] if i > 1000 else None} for i in range(1002)]
    assert texts_trained_on(load(write(tmp_path / "rows.jsonl", rows))) == {None: [("q1001", "p", "n")]}


@pytest.mark.parametrize("nothing", [None, []])
def test_rows_that_lack_a_list_of_texts_are_left_out_too(tmp_path, caplog, nothing):
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": ["n", "m"] if i else nothing} for i in range(3)]
    examples = load(write(tmp_path / "rows.jsonl", rows))
    assert texts_trained_on(examples) == {None: [("q1", "p", "n", "m"), ("q2", "p", "n", "m")]}
    assert "1 of 3 rows are left out, since they lack one of query, pos, neg" in caplog.text


def test_of_e5_the_columns_are_read_that_llm2vec_reads(tmp_path):
    path = write(tmp_path / "nq.jsonl", [{"query": "q", "positive": "p", "negative": "n", "source": "nq"}])
    assert texts_trained_on(load(path, dataset_name="E5")) == {None: [("q", "p", "n")]}


@pytest.fixture
def tasks(tmp_path):
    """Write files of pairs into a folder, of so many rows each."""

    def make(**counts):
        folder = tmp_path / "tasks"
        folder.mkdir()
        for name, count in counts.items():
            write(folder / f"{name}.jsonl", [{"query": f"{name}q{i}", "positive": f"{name}p{i}"} for i in range(count)])
        return folder

    return make


def test_files_of_one_name_do_not_replace_each_other(tasks):
    folder = tasks(nli=6)
    (folder / "nli.csv").write_text("query,positive\nq,p\n")
    with pytest.raises(ConfigError, match=r"nli\.csv and .*nli\.jsonl both give a task 'nli': rename one"):
        load(folder)


def test_a_second_instruction_does_not_replace_a_file(tasks, tmp_path):
    folder = tasks(a=6, a_2=4)
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"a": ["one", "two"], "a_2": "three"}))
    with pytest.raises(ConfigError, match=r"a\.jsonl and .*a_2\.jsonl both give a task 'a_2': rename one"):
        load(folder, instruction_file=str(path))
    path.write_text(json.dumps({"a": "one", "a_2": "three"}))
    trained_on = texts_trained_on(load(folder, instruction_file=str(path)))
    assert {name: len(rows) for name, rows in trained_on.items()} == {"a": 6, "a_2": 4}


def test_an_ending_in_capitals_is_read_too(tasks):
    folder = tasks(a=2, b=3)
    (folder / "b.jsonl").rename(folder / "b.JSONL")
    assert set(texts_trained_on(load(folder))) == {"a", "b"}
    assert len(load(folder / "b.JSONL").data) == 3


@pytest.mark.parametrize("limit, taken", [(5, {"a": 2, "b": 3}), (14, {"a": 6, "b": 8}), (99, {"a": 6, "b": 20})])
def test_the_limit_is_that_of_all_files_together(tasks, limit, taken):
    trained_on = texts_trained_on(load(tasks(a=6, b=20), max_train_samples=limit))
    assert trained_on == {name: [(f"{name}q{i}", f"{name}p{i}") for i in range(count)] for name, count in taken.items()}


def test_a_limit_that_leaves_nothing_of_a_file(tasks):
    folder = tasks(a=6, b=20)
    with pytest.raises(ConfigError, match="max_train_samples must be at least 2, one for each file; got 1"):
        load(folder, max_train_samples=1)
    assert texts_trained_on(load(folder / "a.jsonl", max_train_samples=1)) == {None: [("aq0", "ap0")]}


def test_no_prompt_of_a_part_without_rows_stands_before_others(tasks, tmp_path):
    from bidirect_patch.cli.simcse.instructions import column_prompts

    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"a": ["", "two"]}))
    data, _, prompts, _ = load(tasks(a=1) / "a.jsonl", instruction_file=str(path))
    assert data[0]["anchor"] == "aq0" and column_prompts(data, prompts) is None
