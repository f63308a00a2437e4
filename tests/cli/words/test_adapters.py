"""The adapters of the steps before: the token that they were trained behind, and the classifiers that were trained over them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaModel

from bidirect_patch import enable_bidirectional

from ...helpers import mntp_runs
from ...helpers.word_runs import HAS_CLASSES, error_line, results, run, sentences, write_model

pytest.importorskip("accelerate", reason="the training commands need the extra [train]")
pytest.importorskip("datasets", reason="the training commands need the extra [train]")
peft = pytest.importorskip("peft", reason="the training commands need the extra [train]")
if not HAS_CLASSES:
    pytest.skip("this transformers has no LlamaForTokenClassification", allow_module_level=True)

END, BEGINNING = 2, 1


@pytest.fixture
def tested(settings, place, tmp_path):
    """The settings of a run over a model whose tokenizer puts no token before a text; a classifier alone is written."""
    write_model(tmp_path / "bare", adds_bos=False)
    settings |= {"model_name_or_path": str(tmp_path / "bare"), "test_file": str(place / "test.conllu")}
    return settings | {"merge_subwords": True, "max_steps": 4}


def trained_behind_the_end_token(tested, tmp_path, **change):
    """An adapter of `mntp`, its folder."""
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(row["tokens"]) for row in sentences(40, seed=3)))
    common = ("model_name_or_path", "cache_dir", "report_to", "use_cpu", "disable_tqdm", "save_strategy", "do_train")
    mntp = {name: tested[name] for name in common} | {"train_file": str(tmp_path / "texts.txt"), "line_by_line": True}
    mntp |= {"mask_token": "n5", "max_steps": 1, "sink_token": "eos", "output_dir": str(tmp_path / "mntp")} | change
    assert mntp_runs.run(mntp) == 0
    return mntp["output_dir"]


def beginning_of(folder):
    return AutoTokenizer.from_pretrained(folder)("n1")["input_ids"][0]


@pytest.mark.parametrize("sinks", [0, 1])
def test_the_token_that_an_adapter_was_trained_behind_stays_before_each_sentence(tested, tmp_path, sinks):
    adapter = trained_behind_the_end_token(tested, tmp_path, num_sink_tokens=sinks)
    tested |= {"peft_model_name_or_path": adapter}
    found = {}
    for name, change in {"given": {}, "eos": {"sink_token": "eos"}, "bos": {"sink_token": "bos"}}.items():
        own = tested | change | {"output_dir": str(tmp_path / name)}
        assert run(own) == 0
        found[name] = results(own)["test_loss"]
    assert found["given"] == found["eos"] != found["bos"]
    assert [beginning_of(tmp_path / name) for name in ("given", "eos", "bos")] == [END, END, BEGINNING]


def test_the_token_of_an_adapter_under_one_without_a_tokenizer(tested, tmp_path):
    first = trained_behind_the_end_token(tested, tmp_path, num_sink_tokens=1)
    second = write_adapter(tested["model_name_or_path"], tmp_path / "second")
    tested |= {"model_name_or_path": first, "tokenizer_name": tested["model_name_or_path"]}
    assert run(tested | {"peft_model_name_or_path": second}) == 0
    assert beginning_of(tested["output_dir"]) == END


def test_without_a_tokenizer_beside_the_adapter_the_beginning_token_is_the_sink(tested, tmp_path):
    adapter = write_adapter(tested["model_name_or_path"], tmp_path / "adapter")
    assert run(tested | {"peft_model_name_or_path": adapter, "num_sink_tokens": 1}) == 0
    assert beginning_of(tested["output_dir"]) == BEGINNING


@pytest.mark.parametrize("token", ["bos", "eos"])
def test_the_token_that_a_classifier_was_trained_behind(tested, tmp_path, token):
    """With another tokenizer too, and whatever the adapter below was trained behind."""
    tested |= {"num_sink_tokens": 1}
    tested |= {"peft_model_name_or_path": trained_behind_the_end_token(tested, tmp_path), "sink_token": token}
    assert run(tested) == 0
    for name in (None, tested["model_name_or_path"]):
        again = evaluation(tested) | {"tokenizer_name": name, "peft_model_name_or_path": tested["peft_model_name_or_path"]}
        assert run(again) == 0
        assert results(again)["test_loss"] == pytest.approx(results(tested)["test_loss"], rel=1e-5)


def write_adapter(model, folder, seed=5):
    """A random adapter that changes much, its folder."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    base = enable_bidirectional(LlamaModel.from_pretrained(model))
    peft.get_peft_model(base, lora).save_pretrained(folder)
    return str(folder)


def evaluation(settings, name="again"):
    """The settings that evaluate the classifier of a run on its model, without its adapters."""
    kept = ("model_name_or_path", "test_file", "use_cpu", "report_to", "cache_dir", "disable_tqdm")
    folder = settings["output_dir"]
    return {name: settings[name] for name in kept} | {"cls_addr": folder, "output_dir": f"{folder}-{name}"}


@pytest.fixture
def adapters(tested, tmp_path):
    """Two, the first with a tokenizer, so that it can be named as the model."""
    first, second = (write_adapter(tested["model_name_or_path"], tmp_path / f"adapter{n}", seed=n) for n in (1, 2))
    AutoTokenizer.from_pretrained(tested["model_name_or_path"]).save_pretrained(first)
    return first, second


OVER = {
    "an adapter": lambda first, second: {"peft_model_name_or_path": first},
    "an adapter as the model": lambda first, second: {"model_name_or_path": first},
    "both": lambda first, second: {"model_name_or_path": first, "peft_model_name_or_path": second},
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("is_checkpoint", [False, True], ids=["result", "checkpoint"])
def test_a_classifier_is_evaluated_over_the_adapters_that_it_was_trained_over(
    tested, adapters, tmp_path, monkeypatch, over, is_checkpoint
):
    """On the model under them, and on that which it was trained on; from another folder too."""
    monkeypatch.chdir(tmp_path)
    change = OVER[over](*(Path(adapter).name for adapter in adapters))
    train = tested | change | {"merge_subwords": not is_checkpoint, "save_strategy": "steps", "save_steps": 4}
    assert run(train) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, model in enumerate({tested["model_name_or_path"], OVER[over](*adapters).get("model_name_or_path")} - {None}):
        again = evaluation(tested, str(number)) | {"model_name_or_path": model}
        again["cls_addr"] += "/checkpoint-4" * is_checkpoint
        assert run(again) == 0
        assert results(again)["test_loss"] == pytest.approx(results(train)["test_loss"], rel=1e-5)


def test_an_adapter_that_was_moved_is_asked_for(tested, adapters, tmp_path, capsys):
    tested |= {"peft_model_name_or_path": adapters[0]}
    assert run(tested) == 0
    moved = shutil.move(adapters[0], tmp_path / "moved")
    again = evaluation(tested)
    said = error_line(capsys, again)
    assert f"was trained over the adapter {adapters[0]}, which is not there any more: give peft_model_name_or_path" in said
    assert not Path(again["output_dir"]).exists()
    for change in ({"peft_model_name_or_path": str(moved)}, {"model_name_or_path": str(moved)}):
        assert run(again | change) == 0
        assert results(again)["test_loss"] == pytest.approx(results(tested)["test_loss"], rel=1e-5)


def test_two_adapters_of_which_one_was_moved(tested, adapters, tmp_path, capsys):
    tested |= {"model_name_or_path": adapters[0], "peft_model_name_or_path": adapters[1]}
    assert run(tested) == 0
    moved = shutil.move(adapters[1], tmp_path / "moved")
    again = evaluation(tested)
    said = error_line(capsys, again)
    way = f"give model_name_or_path {adapters[0]} and peft_model_name_or_path {adapters[1]}, by the path that it has now"
    assert said.endswith(f"{adapters[1]}, which is not there any more: {way}")
    assert run(again | {"peft_model_name_or_path": str(moved)}) == 0
    assert results(again)["test_loss"] == pytest.approx(results(tested)["test_loss"], rel=1e-5)


def test_an_adapter_is_not_merged_into_a_model_that_may_have_it_already(tested, adapters, tmp_path, capsys):
    tested |= {"peft_model_name_or_path": adapters[0]}
    assert run(tested) == 0
    base = shutil.copytree(tested["model_name_or_path"], tmp_path / "other")
    model = enable_bidirectional(LlamaModel.from_pretrained(base))
    merged = peft.PeftModel.from_pretrained(model, adapters[0]).merge_and_unload()
    merged.save_pretrained(base)
    again = evaluation(tested) | {"model_name_or_path": str(base)}
    said = error_line(capsys, again)
    assert f"on {tested['model_name_or_path']}, and the model is {base}: give peft_model_name_or_path {adapters[0]}" in said
    assert said.endswith("or, if the model has it in its weights, take adapters out of words.json")
    path = Path(tested["output_dir"]) / "words.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapters": []}))
    assert run(again) == 0
    assert results(again)["test_loss"] == pytest.approx(results(tested)["test_loss"], rel=1e-5)


def test_a_classifier_that_says_nothing_of_adapters(tested, adapters):
    """As older versions of this package wrote it: the adapter that is given counts."""
    tested |= {"peft_model_name_or_path": adapters[0]}
    assert run(tested) == 0
    path = Path(tested["output_dir"]) / "words.json"
    said = json.loads(path.read_text())
    del said["base"], said["adapters"]
    path.write_text(json.dumps(said))
    losses = []
    for change in ({"peft_model_name_or_path": adapters[0]}, {}):
        again = evaluation(tested) | change
        assert run(again) == 0
        losses.append(results(again)["test_loss"])
    assert losses[0] == pytest.approx(results(tested)["test_loss"], rel=1e-5) != losses[1]
