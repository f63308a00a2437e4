"""The examples for training, from files of several kinds."""

import json

import pytest

pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("datasets", reason="the contrastive step needs the extra [simcse]")


def load(path, **options):
    from bidirect_patch.cli.simcse.data import load_examples
    from bidirect_patch.cli.simcse.settings import TextArguments

    cache = path.parent / "cache"
    return load_examples(TextArguments(dataset_file_path=str(path), cache_dir=str(cache), **options))


@pytest.mark.parametrize(
    "names",
    [
        ("query", "positive", "negative"),
        ("negative", "positive", "query"),
        ("anchor", "positive"),
        ("positive", "anchor"),
        ("sentence1", "sentence2"),
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
    data, single, prompts = load(path)
    assert single and not prompts
    assert list(data.column_names) == ["anchor", "positive"]
    assert data[:] == {"anchor": ["w1", "w2"], "positive": ["w1", "w2"]}
