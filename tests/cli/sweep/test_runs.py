"""Whole runs: what is printed is what a model that is built step by step gives, and what is written opens as that."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from bidirect_patch import bidirectional
from bidirect_patch.cli import main

from ...helpers.processes import in_a_new_process
from ...helpers.simcse_runs import write_pairs

pytest.importorskip("datasets", reason="the command needs the extra [train]")


def run(place, *flags):
    return main(["sweep", str(place / "model"), "--eval_sts", str(place / "dev.csv"), *map(str, flags)])


def measured(place, *names):
    """The rows of a run on these files, and the pairs."""
    from bidirect_patch.cli.sweep.model import Source
    from bidirect_patch.cli.sweep.steps import _measure, _read

    files = {name: _read("", str(place / name), 2) for name in names}
    return _measure(Source.of(str(place / "model"), None), files).files


@torch.no_grad()
def honest(place, setup, texts):
    """The embeddings of texts, one at a time, by a model that is cut and run as a whole."""
    from bidirect_patch.cli.layers import keep_layers

    model = AutoModel.from_pretrained(place / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    keep_layers(model, setup.layers)
    first = [] if setup.first_token is None else [tokenizer.convert_tokens_to_ids(setup.first_token)]
    attention = setup.attention
    rows = []
    with bidirectional(
        model, attention.bidirectional, num_sink_tokens=attention.sinks, num_sinkless_layers=attention.blind
    ):
        for text in texts:
            states = model(input_ids=torch.tensor([first + tokenizer(text)["input_ids"]]))[0][0]
            states = states if setup.pooling.with_first or len(states) == 1 else states[1:]
            weights = torch.arange(1.0, len(states) + 1) if setup.pooling.mode == "weighted_mean" else torch.ones(len(states))
            rows.append((weights[:, None] * states).sum(0) / weights.sum())
    return torch.stack(rows).double().numpy()


def cosines_of(rows, pairs):
    one, two = rows[pairs.first], rows[pairs.second]
    return ((one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)).round(12)


def test_each_row_is_what_an_honest_model_gives(place):
    (rows, dev), (others, test) = measured(place, "dev.csv", "test.jsonl").values()
    assert len(rows) == 6 and [row.setup for row in rows] == [row.setup for row in others]
    checked = 0
    for row, other in zip(rows, others):
        if not row.setup.attention.can_be_saved:
            continue
        embeddings = honest(place, row.setup, dev.texts)
        centre = embeddings.mean(0) if row.setup.centred else 0
        assert np.allclose(row.cosines, cosines_of(embeddings - centre, dev), atol=1e-5)
        assert np.allclose(other.cosines, cosines_of(honest(place, row.setup, test.texts) - centre, test), atol=1e-5)
        checked += 1
    assert checked == 5


def test_what_is_printed(place, capsys, monkeypatch):
    from bidirect_patch.cli.sweep import scores

    monkeypatch.setattr(scores, "DRAWS", 50)
    pytest.importorskip("peft", reason="the training command needs the extra [train]")
    assert run(place, "--test-file", place / "test.jsonl") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "dev.csv: 40 pairs" in out and "test.jsonl: 30 pairs, on which nothing was chosen" in out
    starts = ("causal  ", "causal, first token hidden", "bidirectional  ", "bidirectional, 1 sink token  ")
    table = [next(line for line in lines if line.startswith(start)) for start in starts]
    assert len(re.findall(r"\[", table[0])) == 2 and len(re.findall(r"\[", table[2])) == 4
    settings = json.loads(out[out.index("{") : out.index("}") + 1])
    assert settings["model_name_or_path"] == str(place / "model") and 1 <= settings["layers"] <= 4
    assert "--output_dir writes this encoder" in out


def rows_by_hand(attention, pooling_mode, **fields):
    from bidirect_patch.cli.sweep.setups import Pooling, Setup

    return Setup(attention, fields.get("token"), 3, Pooling(pooling_mode, fields.get("with_first", False)), True)


@pytest.mark.parametrize(
    "attention, mode, expected",
    [
        ((False, 0, 0), "mean", {"bidirectional": False, "pooling_mode": "mean"}),
        ((True, 0, 0), "weighted_mean", {"num_sink_tokens": 0, "num_sinkless_layers": 0, "pooling_mode": "weighted_mean"}),
        ((True, 1, 2), "mean", {"num_sink_tokens": 1, "num_sinkless_layers": 2, "sink_token": "</s>", "pooling_mode": "mean"}),
    ],
)
def test_the_training_commands_take_the_settings(place, tmp_path, attention, mode, expected):
    from bidirect_patch.cli.sweep.best_settings import encoder_settings
    from bidirect_patch.cli.sweep.model import Source
    from bidirect_patch.cli.sweep.setups import Attention

    pytest.importorskip("peft", reason="the training command needs the extra [train]")
    setup = rows_by_hand(Attention(*attention), mode, token=expected.get("sink_token"))
    settings = encoder_settings(Source(str(place / "model")), setup)
    assert settings == {"model_name_or_path": str(place / "model"), "torch_dtype": "float32", "layers": 3, **expected}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    flags = [str(path), "--do_train", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    if "bidirectional" not in expected:  # which mntp doesn't have, since it trains no causal model
        from bidirect_patch.cli.mntp.settings import parse

        found = {name: value for part in parse([*flags, "--train_file", "x.txt"]) for name, value in vars(part).items()}
        assert {name: found[name] for name in settings} == settings
    pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
    from bidirect_patch.cli.simcse.settings import parse as parse_simcse

    encoder = parse_simcse([*flags, "--dataset_file_path", "x.txt"]).encoder
    assert {name: getattr(encoder, name) for name in settings} == settings


OPENED = """
import sys, json
import bidirect_patch.auto
from sentence_transformers import SentenceTransformer
for folder in sys.argv[1:]:
    model = SentenceTransformer(folder, device="cpu")
    texts = json.load(open(f"{folder}.texts.json"))
    json.dump(model.encode(texts, batch_size=7).tolist(), open(f"{folder}.rows.json", "w"))
"""


def opened(texts_of):
    """The embeddings that folders give, each of its texts, in a process of their own."""
    for folder, texts in texts_of.items():
        folder.with_suffix(".texts.json").write_text(json.dumps(texts))
    in_a_new_process("-c", OPENED, *texts_of)
    return [np.array(json.loads(folder.with_suffix(".rows.json").read_text())) for folder in texts_of]


@pytest.mark.slow
def test_the_folder_gives_the_numbers_that_were_printed(place, tmp_path, capsys):
    from bidirect_patch.cli.spearman import spearman
    from bidirect_patch.cli.sweep.steps import _read

    pytest.importorskip("sentence_transformers", "6", reason="the folder needs the extra [simcse]")
    pytest.importorskip("peft", reason="the folder needs the extra [simcse]")
    folder = tmp_path / "encoder"
    assert run(place, "--output-dir", folder) == 0
    out = capsys.readouterr().out
    best = re.search(r"Best: (.*?); ", out)[1]
    printed = next(line for line in out.splitlines() if line.startswith(best + "  "))
    pairs = _read("", str(place / "dev.csv"), 2)
    (embeddings,) = opened({folder: pairs.texts})
    value = 100 * spearman(cosines_of(embeddings, pairs), pairs.scores)
    assert f"{value:.1f}" == printed[len(best) :].split()[0]
    assert json.loads((folder / "settings.json").read_text())["layers"]


@pytest.mark.slow
def test_every_kind_of_folder(place, tmp_path):
    from bidirect_patch.cli.sweep.folder import save
    from bidirect_patch.cli.sweep.measure import Row
    from bidirect_patch.cli.sweep.model import Source
    from bidirect_patch.cli.sweep.setups import Attention
    from bidirect_patch.cli.sweep.steps import _read

    pytest.importorskip("sentence_transformers", "6", reason="the folder needs the extra [simcse]")
    texts = [*_read("", str(place / "dev.csv"), 2).texts[:20], "w3"]
    expected = {}
    for mode, with_first, token in (("mean", True, None), ("weighted_mean", False, "<s>")):
        for numbers in ((False, 0, 0), (True, 0, 0), (True, 1, 0), (True, 1, 1), (True, 1, 2)):
            attention = Attention(*numbers)
            how = dict(with_first=False, token=token or "</s>") if attention.sinks else dict(with_first=with_first, token=token)
            setup = rows_by_hand(attention, mode, **how)
            rows = honest(place, setup, texts)
            folder = tmp_path / f"{mode}-{attention.bidirectional}-{attention.sinks}-{attention.blind}"
            save(Row(setup, rows.mean(0), np.zeros(0)), Source(str(place / "model")), str(folder))
            expected[folder] = rows - rows.mean(0)
    for (folder, wanted), found in zip(expected.items(), opened(dict.fromkeys(expected, texts))):
        assert np.allclose(found, wanted, atol=1e-4), folder.name


def test_a_first_token_is_chosen_on_a_part_of_many_pairs(tmp_path, place, monkeypatch):
    """With each first token a part is encoded, and with the better two the rest."""
    from bidirect_patch.cli.sweep import measure
    from bidirect_patch.cli.sweep.encode import Embeddings

    monkeypatch.setattr(measure, "SCREENING", 30)
    write_pairs(tmp_path / "dev.csv", count=60)
    encoded = {}
    add = Embeddings.add

    def counted(self, texts, progress):
        key = self.family, tuple(self.ids[0][:1])
        encoded.setdefault(key, []).append(len(self.lacking(texts)))
        add(self, texts, progress)

    monkeypatch.setattr(Embeddings, "add", counted)
    (tmp_path / "model").symlink_to(place / "model")
    rows, pairs = measured(tmp_path, "dev.csv")["dev.csv"]
    for family in measure.BLIND:
        counts = sorted(([n for n in each if n] for (own, _), each in encoded.items() if own == family), key=len)
        # The tokenizer as it is, but with sinks, and with its three special tokens before each text.
        assert list(map(len, counts)) == ([1, 2, 2] if family.sinks else [1, 1, 2, 2])
        better = counts[-1]
        assert sum(better) == len(pairs.texts)
        assert all(each == better[: len(each)] for each in counts)
    assert len(rows) == 6


def test_depths_that_are_far_from_the_best_are_left_out():
    """Each attention has its own best; one that is just near enough stays."""
    from bidirect_patch.cli.sweep.measure import MARGIN, _promising
    from bidirect_patch.cli.sweep.passes import Depth

    near, far = 0.8 - MARGIN + 1e-6, 0.8 - MARGIN - 1e-6
    values = {Depth(0, 1): far, Depth(0, 2): 0.8, Depth(0, 3): near}
    values |= {Depth(1, 2): 0.2, Depth(1, 3): 0.2 + MARGIN / 2, Depth(2, 3): -1.0}
    assert _promising(values) == [Depth(0, 2), Depth(0, 3), Depth(1, 2), Depth(1, 3), Depth(2, 3)]


def test_the_best_first_token_of_the_better_half_is_kept_with_the_depths_near_its_best(monkeypatch):
    from bidirect_patch.cli.sweep import measure
    from bidirect_patch.cli.sweep.passes import Depth
    from bidirect_patch.cli.sweep.texts import Pairs

    far, near, blind = Depth(0, 1), Depth(0, 2), Depth(1, 2)
    on_part = {"a": 0.5, "b": 0.9, "c": 0.8, "d": 0.1}
    on_all = {"a": 1.0, "b": 0.6, "c": 0.7, "d": 1.0}
    asked = []

    def values(embeddings, pairs, chosen):
        value = (on_all if len(chosen) == len(pairs.scores) else on_part)[embeddings.token]
        asked.append((embeddings.token, len(chosen), tuple(embeddings.depths)))
        found = {far: value - 2 * measure.MARGIN, near: value, blind: value - 0.5}
        return {depth: found[depth] for depth in embeddings.depths}

    monkeypatch.setattr(measure, "_depths", lambda parts, family: [far, near, blind])
    monkeypatch.setattr(measure, "_best_by_depth", values)
    monkeypatch.setattr(measure, "encode", lambda *args: None)
    texts = np.arange(100)
    pairs = Pairs([""] * 200, texts, texts + 100, texts / 100)
    chosen = measure._choose_first_token(None, measure.SINK, dict.fromkeys("abcd", [[0]] * 200), "abcd", pairs)
    assert (chosen.token, chosen.depths) == ("c", [near, blind])
    assert asked[0] == ("a", 64, (far, near, blind)) and asked[1] == ("b", 64, (near, blind))
    assert [(token, count) for token, count, _ in asked[2:]] == [("c", 64), ("d", 64), ("b", 100), ("c", 100)]


def test_no_number_of_blind_layers_is_lost_with_another_token():
    from bidirect_patch.cli.sweep.measure import _among
    from bidirect_patch.cli.sweep.passes import Depth

    depths = [Depth(0, 1), Depth(0, 2), Depth(1, 2)]
    assert _among(depths, [Depth(0, 2), Depth(1, 3)]) == [Depth(0, 2), Depth(1, 2)]


def test_a_batch_holds_texts_of_about_one_length():
    """Each text once, whatever its length, and little padding in any batch."""
    from bidirect_patch.cli.sweep.texts import BATCH_TOKENS, SHORTEST, batches

    ids = [[1] * length for length in (3, 50, 4, 3000, 48, 41, 39, 1, *[20] * 200)]
    seen = []
    for batch, rows, mask in batches(ids, range(len(ids))):
        seen += batch
        assert rows.shape == mask.shape and mask.sum(1).tolist() == [len(ids[i]) for i in batch]
        assert len(batch) == 1 or (mask.sum(1).min() >= SHORTEST * rows.shape[1] and rows.numel() <= BATCH_TOKENS)
    assert sorted(seen) == list(range(len(ids)))
