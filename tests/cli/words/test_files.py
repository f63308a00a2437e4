"""Files of words: what is read of each kind, and what is said of a malformed one."""

import pytest

from bidirect_patch.errors import ConfigError

pytest.importorskip("datasets", reason="the training commands need the extra [train]")
pytest.importorskip("peft", reason="the training commands need the extra [train]")
from bidirect_patch.cli.words.data import Sentence, load_data
from bidirect_patch.cli.words.files import read_file
from bidirect_patch.cli.words.settings import parse


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


CONLLU = """\
# sent_id = 1
# text = Don't!
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t0\troot\t_\t_
2\tn't\tnot\t_\tRB\t_\t1\tadvmod\t_\t_
2.1\tgo\t_\tVERB\t_\t_\t_\t_\t_\t_
3\t!\t!\tPUNCT\t.\t_\t1\tpunct\t_\t_

1\t#\t#\tSYM\tNN\t_\t0\troot\t_\t_
"""
IOB2 = "# text = In Rome\n1\tIn\tO\t-\t-\n2\tRome\tB-LOC\t-\t-\n"
CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n# NN I-NP O\n"


def read(folder, path, *flags):
    argv = [
        "--model_name_or_path",
        "m",
        "--do_train",
        "--train_file",
        str(path),
        "--output_dir",
        str(folder / "out"),
        *flags,
    ]
    data = load_data(parse(argv))
    return data.sentences["train"], data.labels


def test_conllu(tmp_path):
    """Ranges and empty nodes are no words; a word without a tag is not scored; a word may be a number sign."""
    path = write(tmp_path, "a.conllu", CONLLU)
    sentences, labels = read(tmp_path, path)
    assert sentences == [Sentence(["Do", "n't", "!"], ["AUX", None, "PUNCT"]), Sentence(["#"], ["SYM"])]
    assert labels == ["AUX", "PUNCT", "SYM"]
    assert read(tmp_path, path, "--task", "xpos")[0][0].labels == ["VB", "RB", "."]
    assert read(tmp_path, path, "--task", "upos") == read(tmp_path, path, "--task", "pos_tags") == (sentences, labels)


@pytest.mark.parametrize("text", [IOB2, "In\tO\nRome\tB-LOC\n", "In O\nRome B-LOC"])
def test_iob2(tmp_path, text):
    assert read(tmp_path, write(tmp_path, "a.iob2", text))[0] == [Sentence(["In", "Rome"], ["O", "B-LOC"])]


@pytest.mark.parametrize(
    "task, labels",
    [
        ("pos_tags", ["NNP", "VBZ"]),
        ("chunk_tags", ["B-NP", "B-VP"]),
        ("ner_tags", ["B-ORG", "O"]),
        (None, ["NNP", "VBZ"]),
    ],
)
def test_conll(tmp_path, task, labels):
    flags = ["--task", task] if task else []
    sentences, _ = read(tmp_path, write(tmp_path, "a.conll", CONLL), *flags)
    assert sentences[0] == Sentence(["EU", "rejects"], labels)
    assert sentences[1].words == ["#"]  # no comment


def test_columns_by_name(tmp_path):
    path = write(tmp_path, "a.txt", "1 A DT X Y\n2 cat NN X Y\n")
    sentences, _ = read(tmp_path, path, "--columns", "_", "tokens", "pos_tags", "_", "other", "--task", "other")
    assert sentences == [Sentence(["A", "cat"], ["Y", "Y"])]
    with pytest.raises(ConfigError, match="there are 5 columns, and 2 to 4 are known by themselves: give columns"):
        read(tmp_path, path)
    with pytest.raises(ConfigError, match="there are 5 columns, and columns names 2"):
        read(tmp_path, path, "--columns", "tokens", "pos_tags")
    assert read(tmp_path, write(tmp_path, "b.conll", "A X\n"))[0] == [Sentence(["A"], ["X"])]


@pytest.mark.parametrize("name", ["tokens", "words"])
def test_json_lines(tmp_path, name):
    """Several kinds of labels; numbers are labels too; what has no label for each word is none."""
    path = write(
        tmp_path,
        "a.jsonl",
        f'{{"{name}": ["A", "b"], "pos_tags": [1, 0], "ner": ["O", "O"], "id": 7, "few": ["O"]}}\n\n',
    )
    assert read(tmp_path, path)[0] == [Sentence(["A", "b"], ["1", "0"])]
    assert read(tmp_path, path, "--task", "ner")[1] == ["O"]
    with pytest.raises(ConfigError, match="has no column of labels few: give task; it has pos_tags, ner"):
        read(tmp_path, path, "--task", "few")


def test_a_folder_and_several_files(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.iob2", "b.iob2"):
        write(tmp_path / "data", name, IOB2)
    assert len(read(tmp_path, tmp_path / "data")[0]) == 2
    assert (
        len(
            read(
                tmp_path,
                tmp_path / "data" / "a.iob2",
                "--max_train_samples",
                "1",
                "--train_file",
                str(tmp_path / "data"),
            )[0]
        )
        == 1
    )


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.conllu", "1\tA\tDT\n", "line 1: CoNLL-U has 10 columns between tabs; got 3"),
        ("a.conllu", "\n\n# x\nA" + "\t_" * 9, "line 4: the first column is the number of a word; got 'A'"),
        ("a.iob2", "A\n", "line 1: a word and its label are needed"),
        ("a.iob2", "1 A B-X\n2 b\n", "line 2: 3 columns are needed"),
        ("a.iob2", "A O\nb PER\n", "line 2: a label of IOB2 is O, B-... or I-...; got 'PER'"),
        ("a.conll", "A DT O O\nb\n", "line 2: 4 columns are needed, as in the first line; got 1"),
        ("a.conll", "A\n", "line 1: there are 1 columns"),
        ("a.jsonl", '{"tokens": ["a"]', "line 1: this is not JSON"),
        ("a.jsonl", '["a"]', "line 1: an object with tokens and labels is needed; got list"),
        ("a.jsonl", '{"tokens": "a b", "pos_tags": ["X", "Y"]}', "line 1: tokens must be a list of words; got 'a b'"),
        ("a.jsonl", '{"tokens": ["a", " "], "pos_tags": ["X", "Y"]}', "line 1: tokens must be a list of words"),
        ("a.jsonl", '{"pos_tags": ["X"]}', "line 1: tokens must be a list of words; got None"),
        ("a.conllu", "", "there is no sentence in"),
        ("a.iob2", "# nothing\n\n", "there is no sentence in"),
        ("a.csv", "a,b\n", "a file of words must end in .conllu, .iob2"),
        ("a.jsonl", '{"tokens": ["a"], "pos_tags": [true]}', "it has none, with a label for each word"),
        ("a.conllu", "1\tA" + "\t_" * 8, "no word of the train data has a label"),
    ],
)
def test_a_malformed_file(tmp_path, name, text, says):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, write(tmp_path, name, text))
    assert says in str(caught.value)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can't read .*a.conllu"):
        read_file(path, None)
    with pytest.raises(ConfigError, match="no such file or folder: nowhere.conllu"):
        read(tmp_path, "nowhere.conllu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no file that ends in"):
        read(tmp_path, tmp_path / "empty")


def test_sentences_are_held_out(tmp_path):
    path = write(tmp_path, "a.iob2", "\n\n".join(f"w{i} O" for i in range(20)))
    argv = [
        "--model_name_or_path",
        "m",
        "--do_train",
        "--do_eval",
        "--train_file",
        str(path),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    data = load_data(parse([*argv, "--validation_split_percentage", "25"])).sentences
    assert [s.words[0] for s in data["validation"]] == [f"w{i}" for i in range(5)] and len(data["train"]) == 15
    with pytest.raises(ConfigError, match=r"too few sentences \(20\) to hold out validation_split_percentage=1"):
        load_data(parse([*argv, "--validation_split_percentage", "1"]))


def test_a_data_set_whose_labels_are_numbers_with_names(tmp_path):
    """As CoNLL-2003 on the hub: the labels are in the order of the data set."""
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "pos_tags": datasets.Sequence(datasets.ClassLabel(names=["Z", "A", "M"])),
        }
    )
    rows = {"tokens": [["a", "b"], ["c"]], "pos_tags": [[1, 0], [1]]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    argv = [
        "--model_name_or_path",
        "m",
        "--do_train",
        "--dataset_name",
        str(tmp_path / "set"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    argv += ["--output_dir", str(tmp_path / "o"), "--task"]
    data = load_data(parse([*argv, "pos_tags"]))
    assert data.labels == ["Z", "A", "M"]
    assert data.sentences["train"] == [Sentence(["a", "b"], ["A", "Z"]), Sentence(["c"], ["A"])]
    with pytest.raises(ConfigError, match="has no column ner_tags; it has tokens, pos_tags"):
        load_data(parse([*argv, "ner_tags"]))
    with pytest.raises(ConfigError, match="has no test split; it has train"):
        load_data(parse([*argv, "pos_tags", "--do_predict"]))
    held = load_data(parse([*argv, "pos_tags", "--do_eval", "--validation_split_percentage", "50"])).sentences
    assert list(map(len, held.values())) == [1, 1]
