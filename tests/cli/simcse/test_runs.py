"""The contrastive step, run as a user runs it: a tiny Llama, a settings file, sentence-transformers' own trainer."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaModel

from bidirect_patch import enable_bidirectional
from bidirect_patch.cli import main

from ...helpers.one_text import reaches_back
from ...helpers.paths import ROOT
from ...helpers.simcse_runs import published, run, write_e5
from ...helpers.words import EOS, make_tokenizer

st = pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
datasets = pytest.importorskip("datasets", reason="the contrastive step needs the extra [simcse]")
peft = pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")


# The others differ from them in names alone. MetaLlama3.1's adapter is a local folder.
ONE_OF_EACH = ("supervised/Llama2", "simcse/Llama2", "supervised/MetaLlama3.1")


@pytest.mark.parametrize("file", ONE_OF_EACH)
def test_a_published_settings_file_runs_with_only_model_data_and_backend_replaced(place, tmp_path, monkeypatch, file):
    """The paths in the file are relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    settings = published(file)
    replaced = {"model_name_or_path": str(place / "model"), "peft_model_name_or_path": str(place / "mntp")}
    replaced |= {"attn_implementation": "sdpa", "dataset_file_path": str(place / "texts.txt")}
    if file.startswith("supervised"):
        write_e5(tmp_path / "e5")
        replaced["dataset_file_path"] = "e5"
    (tmp_path / "settings.json").write_text(json.dumps(settings | replaced))
    assert main(["simcse", "settings.json", "--use_cpu", "--report_to=none", "--cache_dir=cache"]) == 0
    opened = st.SentenceTransformer(settings["output_dir"], device="cpu")
    assert reaches_back(opened[0].model)


def test_training_gives_a_folder_that_opens_bidirectional(settings, place):
    assert run(settings) == 0
    out = settings["output_dir"]
    assert json.loads(Path(out, "config.json").read_text())["is_causal"] is False
    opened = st.SentenceTransformer(out, device="cpu")
    assert reaches_back(opened[0].model)
    texts = ["w1 w2 w3", "w4 w5"]
    hidden = [AutoModel.from_pretrained(out)(**opened.tokenizer(t, return_tensors="pt"))[0].mean(1) for t in texts]
    torch.testing.assert_close(torch.tensor(opened.encode(texts)), torch.cat(hidden).detach(), rtol=1e-4, atol=1e-4)
    # trained, from the merged adapter on: neither the base nor the base with MNTP gives this
    base = LlamaModel.from_pretrained(place / "model")
    mntp = peft.PeftModel.from_pretrained(enable_bidirectional(base), str(place / "mntp")).merge_and_unload()
    weight = "layers.0.self_attn.q_proj.weight"
    moved = (opened[0].model.state_dict()[weight] - mntp.state_dict()[weight]).abs().max()
    away = (
        (opened[0].model.state_dict()[weight] - LlamaModel.from_pretrained(place / "model").state_dict()[weight])
        .abs()
        .max()
    )
    assert 0 < moved < away


def with_tokenizer(settings, place, tmp_path, **changes):
    """The settings, with a copy of the model whose tokenizer has these attributes."""
    folder = shutil.copytree(place / "model", tmp_path / "changed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    small = {"gradient_checkpointing": False, "stop_after_n_steps": 1}
    return settings | small | {"model_name_or_path": str(folder), "peft_model_name_or_path": None}


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_chat_template_only_if_it_is_asked_for(settings, place, tmp_path, ids_read, asked_for):
    template = "{% for m in messages %}w59 {{ m['content'] }} w58{% endfor %}"
    settings = with_tokenizer(settings, place, tmp_path, chat_template=template)
    assert run(settings | ({"chat_template": True} if asked_for else {})) == 0
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    first, last = tokenizer("w59 w58", add_special_tokens=False)["input_ids"]

    def wrapped(ids):
        return first in ids[:2] and ids[-1] == last

    plain = [tokenizer(line)["input_ids"] for line in (place / "texts.txt").read_text().splitlines()]
    if asked_for:
        assert all(wrapped(ids) for ids in ids_read)
    else:
        unknown = tokenizer.unk_token_id  # sentence-transformers' model card has texts of its own
        assert [ids for ids in ids_read if unknown not in ids and ids not in plain] == []
    ids_read.clear()
    st.SentenceTransformer(settings["output_dir"], device="cpu").encode(["w1 w2 w3"])
    (ids,) = ids_read
    assert wrapped(ids) if asked_for else ids == tokenizer("w1 w2 w3")["input_ids"]


def test_a_chat_template_that_the_tokenizer_lacks_is_refused(settings, capsys):
    assert run(settings | {"chat_template": True}) == 2
    assert "chat_template is given, and the tokenizer has none" in capsys.readouterr().err


@pytest.mark.parametrize("limit, read", [({}, 20), ({"encode_max_seq_length": 12}, 12)])
def test_the_length_for_training_is_not_the_encoders_limit(settings, ids_read, limit, read):
    settings |= {"max_seq_length": 8, "stop_after_n_steps": 1, "gradient_checkpointing": False}
    assert run(settings | limit) == 0
    assert max(map(len, ids_read)) == 8
    ids_read.clear()
    opened = st.SentenceTransformer(settings["output_dir"], device="cpu")
    opened.encode(" ".join(["w1"] * 20))
    assert list(map(len, ids_read)) == [read]
    assert opened.max_seq_length == limit.get("encode_max_seq_length", 256)  # the tokenizer's own limit
    assert json.loads(Path(settings["output_dir"], "tokenizer.json").read_text())["truncation"] is None


def test_a_limit_beyond_the_models_is_refused(settings, capsys):
    assert run(settings | {"encode_max_seq_length": 257}) == 2
    assert "encode_max_seq_length must be at most 256" in capsys.readouterr().err


def test_eos_token_pools_an_end_token_that_is_appended(settings, ids_read):
    settings |= {"pooling_mode": "eos_token", "max_seq_length": 8, "stop_after_n_steps": 1}
    assert run(settings | {"gradient_checkpointing": False}) == 0
    assert {ids[-1] for ids in ids_read} == {2} and max(map(len, ids_read)) == 8  # a text that is cut has it too
    ids_read.clear()
    opened = st.SentenceTransformer(settings["output_dir"], device="cpu")
    embeddings = opened.encode(["w1 w2 w3", "w4"], convert_to_tensor=True)
    assert [ids[-2:] for ids in ids_read] == [[6, 2], [7, 2]]
    end = opened[0].model(input_ids=torch.tensor([ids_read[0]]))[0][0, -1]
    torch.testing.assert_close(embeddings[0], end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": False}])
def test_the_end_token_is_appended_once_and_kept_in_the_folder(tmp_path, flags):
    from bidirect_patch.cli.simcse.end_token import append_end_token

    make_tokenizer(**flags).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    before = tokenizer("w1 w2")["input_ids"]
    for _ in range(2):
        tokenizer = append_end_token(tokenizer)
        assert tokenizer("w1 w2")["input_ids"] == [*before, EOS]
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w1 w2")["input_ids"] == [*before, EOS]


def test_pairs_and_triplets_by_file(supervised):
    """A folder of files, each a task of its own: in-batch negatives come from the same one."""
    assert run(supervised | {"pooling_mode": "eos_token", "stop_after_n_steps": 1}) == 0
    opened = st.SentenceTransformer(supervised["output_dir"], device="cpu")
    assert reaches_back(opened[0].model)
    assert opened[1].pooling_mode in ("lasttoken", ["lasttoken"], ("lasttoken",))


def test_the_loss_falls(settings):
    """With two views of 16 texts and negatives in the batch, a few steps at a high rate are seen in the loss."""
    settings |= {"logging_steps": 1, "stop_after_n_steps": 12, "num_train_epochs": 4, "gradient_checkpointing": False}
    settings |= {"save_steps": 12, "save_only_model": False}
    assert run(settings) == 0
    state = json.loads(Path(settings["output_dir"], "checkpoint-12", "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_equal_views_are_refused(settings, capsys):
    assert run(settings | {"simcse_dropout": 0.0}) == 2
    assert "two encodings of one text are equal" in capsys.readouterr().err
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"simcse_droput": 0.3}, "did you mean 'simcse_dropout'"),
        ({"simcse_dropout": 1.5}, "simcse_dropout must be in [0, 1)"),
        ({"dataset_file_path": "nowhere.txt"}, "nowhere.txt"),
        ({"model_name_or_path": "./nowhere"}, "can't load"),
        ({"do_train": False}, "nothing to do"),
        ({"loss_class": "Other"}, "loss_class"),
    ],
)
def test_bad_settings_are_one_line(settings, capsys, wrong, says):
    assert run(settings | wrong) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bidirect-patch: error:") and says in error


def test_a_package_that_is_missing_is_named(settings, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert run(settings) == 2
    error = capsys.readouterr().err
    assert error == (
        "bidirect-patch: error: simcse needs sentence_transformers: pip install 'bidirect-patch[simcse]'\n"
    )


def test_an_output_folder_that_is_a_file(settings, capsys):
    Path(settings["output_dir"]).write_text("mine")
    assert run(settings) == 2
    assert "is a file: give a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_real_weights_from_gguf(real_weights, settings):
    gguf = pytest.importorskip("gguf", reason="reading GGUF needs the extra [train]")
    name = next(real_weights.glob("*.gguf")).name
    settings |= {"model_name_or_path": str(real_weights), "gguf_file": name, "peft_model_name_or_path": None}
    settings |= {"per_device_train_batch_size": 4, "max_seq_length": 8, "stop_after_n_steps": 1, "max_train_samples": 8}
    settings |= {"learning_rate": 1e-5}  # so that the weights stay what they were, to 1e-4
    assert run(settings) == 0
    opened = st.SentenceTransformer(settings["output_dir"], device="cpu")
    assert reaches_back(opened[0].model)
    stock = AutoTokenizer.from_pretrained(real_weights, gguf_file=name)
    text = "The weather is fine today."
    assert opened.tokenizer(text)["input_ids"] == stock(text)["input_ids"]
    read = next(t for t in gguf.GGUFReader(str(real_weights / name)).tensors if t.name == "blk.0.ffn_up.weight")
    expected = torch.from_numpy(gguf.dequantize(read.data, read.tensor_type))
    torch.testing.assert_close(opened[0].model.layers[0].mlp.up_proj.weight, expected, rtol=0, atol=1e-4)


def test_no_progress_bar_is_written_into_a_pipe(settings, capfd):
    assert run(settings | {"disable_tqdm": False, "logging_steps": 1}) == 0
    out, err = capfd.readouterr()
    assert "%|" not in err and "examples/s" not in err
    assert out.count("'loss'") == 3  # the log is there all the same


def test_texts_beyond_the_limit_are_cut_without_a_warning(place, caplog):
    """A tokenizer says once that a text is too long: of one that was opened here."""
    from bidirect_patch.cli.simcse.checks import check_known_tokens
    from bidirect_patch.cli.simcse.data import Examples

    tokenizer = AutoTokenizer.from_pretrained(place / "model", model_max_length=4)
    check_known_tokens(tokenizer, Examples(datasets.Dataset.from_dict({"anchor": ["w5 w6 w7 w8 w9 w10"]}), True, {}))
    assert "longer than" not in caplog.text
    tokenizer("w5 w6 w7 w8 w9 w10")
    assert "longer than" in caplog.text


def test_no_module_is_imported_by_a_name_that_sentence_transformers_has_deprecated():
    from sentence_transformers.util.deprecated_import import DEPRECATED_MODULE_PATHS

    imported = set()
    for path in (ROOT / "bidirect_patch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = (alias.name for alias in node.names if alias.name.islower())  # and no classes
                imported |= {node.module, *(f"{node.module}.{name}" for name in modules)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert "sentence_transformers.base.modules" in imported
    assert not imported & set(DEPRECATED_MODULE_PATHS)
