"""The ladder's own arithmetic: poolings, correlations, intervals, the choice of a way, and what is kept between runs."""

import argparse
import functools
import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

if importlib.util.find_spec("scipy") is None:
    pytest.skip("scipy is not installed", allow_module_level=True)

from scipy.stats import spearmanr

from benchmarks.ladder import curves, encode, model, results, statistics, table, texts, training
from benchmarks.ladder.__main__ import Ladder
from benchmarks.ladder.encode import POOLINGS, Way
from benchmarks.ladder.plan import CPU, QUICK, Row
from benchmarks.ladder.texts import DEV, TEST, Pairs

from .helpers.words import make_tokenizer


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[1 / 3, 1 / 3, 1 / 3, 0], [1, 0, 0, 0], [0, 0, 0.5, 0.5]]),
        ("weighted mean", [[1 / 6, 2 / 6, 3 / 6, 0], [1, 0, 0, 0], [0, 0, 1 / 3, 2 / 3]]),
        ("mean without the first token", [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
        ("last token", [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_how_much_each_token_counts(pooling, expected):
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]])  # a text, one of one token, an echo
    torch.testing.assert_close(encode.pooling_weights(mask, pooling), torch.tensor(expected, dtype=torch.float32))


def test_a_correlation_is_scipys_with_ties_too():
    generator = np.random.default_rng(0)
    cosines, scores = generator.normal(size=(3, 40)), generator.integers(0, 6, size=40).astype(float)
    cosines[1, :20] = 0.5
    found = statistics.correlations(cosines, scores)
    np.testing.assert_allclose(found, [100 * spearmanr(row, scores).statistic for row in cosines])


def test_an_interval_holds_the_value_and_a_real_difference_is_outside_zero():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=300)
    good, bad = (scores + noise * generator.normal(size=(2, 300)) for noise in (0.3, 2))
    draws = statistics.Bootstrap([scores], draws=200)
    (value, drawn), (_, drawn_bad) = draws.values([good]), draws.values([bad])
    low, high = statistics.interval(drawn)
    assert low < value < high < low + 5
    assert statistics.interval(drawn - drawn_bad)[0] > 0
    assert statistics.interval(drawn - drawn)[0] == 0


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    return LlamaModel(config).eval()


def test_embeddings_are_those_of_each_text_alone(decoder):
    tokenizer = make_tokenizer()
    lines = ["w7 w8 w9", "w5", "w6 w7 w8 w9 w10 w11"]
    found = encode.embed(decoder, tokenizer, lines, [1, 2])
    assert set(found) == {(layer, pooling) for layer in (1, 2) for pooling in POOLINGS}
    for i, line in enumerate(lines):
        with torch.no_grad():
            out = decoder(torch.tensor([tokenizer(line)["input_ids"]]), output_hidden_states=True)
        for layer, hidden in ((1, decoder.norm(out.hidden_states[1])), (2, out.last_hidden_state)):
            np.testing.assert_allclose(found[layer, "mean"][i], hidden[0].mean(0).detach(), atol=1e-5)
            np.testing.assert_allclose(found[layer, "last token"][i], hidden[0, -1].detach(), atol=1e-5)


def test_an_echo_pools_the_second_time_alone(decoder):
    tokenizer = make_tokenizer()
    found = encode.embed(decoder, tokenizer, ["w7 w8 w9"], [2], echo=True)[2, "mean"][0]
    once = tokenizer("w7 w8 w9")["input_ids"]
    twice = tokenizer("w7 w8 w9 w7 w8 w9")["input_ids"]
    with torch.no_grad():
        hidden = decoder(torch.tensor([twice])).last_hidden_state[0]
    np.testing.assert_allclose(found, hidden[len(once) :].mean(0), atol=1e-5)


def test_a_centred_cosine_is_of_the_embeddings_minus_the_centre(decoder):
    tokenizer = make_tokenizer()
    pairs = Pairs(["w7 w8 w9", "w5"], ["w5", "w6 w7"], np.array([1.0, 2.0]))
    centre = encode.centres(decoder, tokenizer, ["w20 w21", "w22"], [2])
    found = encode.cosines(decoder, tokenizer, pairs, centre)
    rows = encode.embed(decoder, tokenizer, ["w7 w8 w9", "w5", "w6 w7", "w20 w21", "w22"], [2])[2, "mean"].astype(float)
    for way, middle in ((Way(2, "mean", False), 0), (Way(2, "mean", True), rows[3:].mean(0))):
        for i, (a, b) in enumerate(((0, 1), (1, 2))):
            one, other = rows[a] - middle, rows[b] - middle
            expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            np.testing.assert_allclose(found[way][i], expected, atol=1e-5)


def _results(pairs, good):
    """Cosines of every set that agree with the scores in the way `good` alone."""
    generator = np.random.default_rng(1)
    ways = [Way(2, POOLINGS[0], False), Way(2, POOLINGS[1], False), Way(1, POOLINGS[0], True)]
    return {
        name: {way: (p.scores if way == good else 0) + generator.normal(size=len(p)) for way in ways}
        for name, p in pairs.items()
    }


compare = functools.partial(table.Comparison, draws=50)


@pytest.fixture
def pairs():
    generator = np.random.default_rng(0)
    return {name: Pairs(["a"] * 60, ["b"] * 60, generator.normal(size=60) * 3) for name in (DEV, *TEST)}


def test_what_was_measured_is_read_as_it_was_written(pairs, tmp_path):
    written = _results(pairs, None)
    file = results.result_file(tmp_path, CPU.rows[0], 0)
    results.save(file, written)
    read = results.load(file)
    for name, ways in written.items():
        for way, values in ways.items():
            np.testing.assert_allclose(read[name][way], values, rtol=1e-6)


def test_the_table_takes_each_rows_best_way_on_the_development_set_and_tells_who_is_ahead(pairs):
    good = Way(1, POOLINGS[0], True)
    ours, causal = Row("ours", True, mntp=True), Row("theirs", False)
    measured = {ours: [_results(pairs, good), _results(pairs, good)], causal: [_results(pairs, None)]}
    compared = compare(pairs, measured)
    assert compared.ways[ours] == good
    assert f"| ours | 2 |  | {good} |" in table.write_table(compared, {})
    assert table.write_differences(compared).endswith("reached.") and "not reached" not in table.write_differences(compared)
    turned = compare(pairs, {Row("ours", True): measured[causal], Row("theirs", False): measured[ours]})
    assert table.write_differences(turned).endswith("not reached.")


def test_rows_that_differ_in_one_thing_are_set_against_each_other(pairs):
    good, bad = _results(pairs, Way(2, POOLINGS[0], False)), _results(pairs, None)
    names = ("bidirectional + MNTP", "bidirectional, untrained", "causal", "bidirectional + MNTP + SimCSE", "causal + SimCSE")
    measured = {Row(name, name.startswith("bi")): [good if "MNTP" in name else bad] for name in names}
    lines = table.write_contrasts(compare(pairs, measured)).splitlines()[2:]
    found = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines}
    assert list(found) == ["bidirectional + MNTP, minus bidirectional, untrained", "bidirectional, untrained, minus causal"]
    assert float(found["bidirectional + MNTP, minus bidirectional, untrained"].split()[0]) > 50
    assert found["bidirectional, untrained, minus causal"] == "+0.0 [+0.0, +0.0]"
    measured |= {Row("bidirectional + SimCSE", True): [good]}
    assert len(table.write_contrasts(compare(pairs, measured)).splitlines()) == 2 + 4
    assert table.write_contrasts(compare(pairs, {Row("causal", False): [bad]})) == ""


def test_the_depths_are_those_of_rows_that_keep_all_layers(pairs):
    good = Way(2, POOLINGS[0], False)
    measured = {Row("cut", False): [_results(pairs, good)], Row("whole", False, whole=True): [_results(pairs, good)]}
    for ways in measured[Row("whole", False, whole=True)][0].values():
        ways[Way(1, POOLINGS[0], False)] = -ways[good]
    compared = compare(pairs, measured)
    head, _, *rows = table.write_depths(compared).splitlines()
    assert head.split("|")[2:4] == [" 1 ", " 2 "] and len(rows) == 1
    found = [float(cell) for cell in rows[0].split("|")[2:4]]
    assert found[0] == -found[1] and found[1] == round(compared.value_on_dev(Row("cut", False), good), 1) > 80
    assert table.write_depths(compare(pairs, {Row("cut", False): measured[Row("cut", False)]})) == ""


def test_a_set_that_was_not_measured_is_empty(pairs):
    measured = _results(pairs, None)
    del measured["sts2014"]
    compared = compare(pairs, {Row("theirs", False): [measured]})
    line = table.write_table(compared, {}).splitlines()[-1].split("|")
    assert line[8].strip() == "" and line[7].strip() != ""


def test_a_run_that_is_done_is_not_trained_again(tmp_path):
    folder = tmp_path / "mntp-0"
    folder.mkdir()
    (folder / training.TOOK).write_text(json.dumps(3.0))
    training.run_command("no such command", {}, folder, print)
    trainer = training.Trainer(CPU, tmp_path, tmp_path, tmp_path, print)
    assert trainer.seconds(Row("x", True, mntp=True), 2) == 3.0


@pytest.mark.slow  # a process of its own
def test_a_command_that_fails_is_an_error_with_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="failed with 2: see .*x.log"):
        training.run_command("mntp", {"no_such_setting": 1}, tmp_path / "x", print)
    assert not (tmp_path / "x" / training.TOOK).exists()


def test_the_settings_are_those_that_the_commands_take(tmp_path):
    from bidirect_patch.cli.mntp.settings import PRESETS, parse

    for scale in (CPU, QUICK):
        settings = scale.mntp | {"model_name_or_path": "m", "train_file": ["t.txt"], "output_dir": str(tmp_path / "o")}
        (tmp_path / "s.json").write_text(json.dumps(settings | {"do_train": True}))
        found = parse([str(tmp_path / "s.json")])
        assert found.mntp.mlm_probability == [PRESETS["small"]["mlm_probability"]]
        assert found.training.max_steps == scale.mntp.get("max_steps", PRESETS["small"]["max_steps"])


def test_texts_are_read_from_a_folder(tmp_path):
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts" / "stsb-dev.csv").write_text('sentence1,sentence2,score\n"A, b.",c,2.5\nd,e,1\n')
    (tmp_path / "wikipedia.txt").write_text("One two three four five. Six.\n\nSeven eight nine ten eleven twelve.\n")
    found = texts.load_pairs(tmp_path, DEV)
    assert (found.first, found.second, list(found.scores)) == (["A, b.", "d"], ["c", "e"], [2.5, 1.0])
    sentences = [texts.split_sentences(paragraph) for paragraph in texts.load_paragraphs(tmp_path)]
    assert sentences == [["One two three four five."], ["Seven eight nine ten eleven twelve."]]


def test_the_lower_layers_of_a_model_with_windows_are_kept(tmp_path):
    gemma3 = pytest.importorskip("transformers.models.gemma3", reason="this transformers has no Gemma 3")
    config = gemma3.Gemma3TextConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
    )
    whole = gemma3.Gemma3ForCausalLM(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    model.save_plain(tmp_path / "whole", None, tmp_path / "cut", torch.float32, layers=6)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert len(cut.model.layers) == 6
    ids = torch.arange(5, 17)[None]
    hidden = whole(ids, output_hidden_states=True).hidden_states[6]
    torch.testing.assert_close(cut.model(ids).last_hidden_state, whole.model.norm(hidden))


def test_a_finished_encoder_is_no_row_of_ours_and_no_causal_one(pairs):
    good = Way(1, POOLINGS[0], True)
    measured = {
        Row("ours", True): [_results(pairs, None)],
        Row("theirs", False): [_results(pairs, None)],
        Row("ceiling", True, ceiling=True): [_results(pairs, good)],
    }
    differences = table.write_differences(compare(pairs, measured))
    assert "is: ours." in differences and "| theirs |" in differences and "ceiling" not in differences


def test_a_goal_is_not_called_reached_before_all_of_it_is_measured(pairs):
    good = Way(1, POOLINGS[0], True)
    ours, theirs = _results(pairs, good), _results(pairs, None)
    measured = {Row("ours", True): [ours], Row("theirs", False): [theirs]}
    del theirs["sick-r-test"]
    assert table.write_differences(compare(pairs, measured)).endswith("not all of it is measured.")
    del ours["sick-r-test"]
    behind = {Row("ours", True): [theirs], Row("theirs", False): [ours]}
    assert table.write_differences(compare(pairs, behind)).endswith("not reached.")


def test_a_curve_is_what_a_run_wrote_of_itself(tmp_path):
    evaluations = [{"step": step, "eval_sts_spearman": step / 100, "eval_loss": 9 - step / 10} for step in (20, 40)]
    log = [{"step": 20, "loss": 8.0}, *evaluations]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    before = {"before_sts_spearman": 0.1, "before_loss": 9.5, "causal_sts_spearman": 0.65}
    (tmp_path / "all_results.json").write_text(json.dumps(before))
    curve = curves.read(tmp_path)
    assert curve == curves.Curve({0: 10.0, 20: 20.0, 40: 40.0}, 65.0, {0: 9.5, 20: 7.0, 40: 5.0})
    lines = curves.write_table({"one": curve, "stopped": curves.Curve({0: 10.0}, 65.0, {0: 9.5})}).splitlines()
    assert lines[0] == "| after step | 0 | 20 | 40 | held-out loss |"
    assert lines[2:4] == ["| one | 10.0 | 20.0 | 40.0 | 5.00 |", "| stopped | 10.0 |  |  | 9.50 |"]
    assert lines[-1] == "The causal model, untrained: 65.0."


def test_a_run_is_evaluated_on_the_same_pairs_each_time(tmp_path):
    pairs = Pairs([f"a, {i}" for i in range(600)], [f'"b" {i}' for i in range(600)], np.arange(600) / 7)
    settings = curves.evaluation(pairs, tmp_path / "pairs.csv", steps=100)
    assert settings["eval_steps"] == 20 and settings["eval_sts"] == str(tmp_path / "pairs.csv")
    (tmp_path / "sts").mkdir()
    (tmp_path / "pairs.csv").rename(tmp_path / "sts" / "x.csv")
    written = texts.load_pairs(tmp_path, "x")
    expected = pairs.shortened(curves.PAIRS)
    assert (written.first, written.second) == (expected.first, expected.second)
    np.testing.assert_array_equal(written.scores, expected.scores)


@pytest.fixture
def few_texts(tmp_path):
    """What the ladder is given: a folder of texts, and one to work in that has its models already."""
    (tmp_path / "data" / "sts").mkdir(parents=True)
    for name in (DEV, *TEST):
        (tmp_path / "data" / "sts" / f"{name}.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    (tmp_path / "data" / "wikipedia.txt").write_text("One two three four five. Six seven eight nine ten.")
    for folder in ("whole", "quick/model"):
        (tmp_path / "work" / "m" / folder).mkdir(parents=True)
    return argparse.Namespace(data=tmp_path / "data", work=tmp_path / "work", model="m", scale="quick", seeds=1)


def test_a_folder_of_other_texts_is_not_gone_on_with(few_texts):
    expected = ["One two three four five.", "Six seven eight nine ten."]
    assert Ladder(few_texts).sentences == Ladder(few_texts).sentences == expected
    (few_texts.data / "wikipedia.txt").write_text("Another.")
    with pytest.raises(SystemExit, match="name another --work"):
        Ladder(few_texts)
    assert (few_texts.work / "m" / "quick" / "sentences.txt").read_text().splitlines() == expected


def test_a_run_that_was_stopped_before_the_development_set_is_left_out(few_texts, pairs):
    ladder = Ladder(few_texts)
    measured = _results(pairs, None)
    for row, found in zip(QUICK.rows, (measured, {name: ways for name, ways in measured.items() if name != DEV})):
        results.save(results.result_file(ladder.work, row, 0), found)
    assert [row.name for row, seeds in ladder.results().items() if seeds] == [QUICK.rows[0].name]
