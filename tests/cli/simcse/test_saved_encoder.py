"""What `simcse` is given as its model: an encoder that was trained before, an adapter, a model with another dropout."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from bidirect_patch.cli import main

from ...helpers.simcse_runs import run, write_pairs

st = pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")

TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w5 w6", "w7"]


@pytest.fixture
def small(settings):
    """A short run without an adapter of the step before."""
    less = {"stop_after_n_steps": 2, "gradient_checkpointing": False, "peft_model_name_or_path": None}
    del settings["pooling_mode"]
    return settings | less


def again(settings, tmp_path):
    """What a run on the encoder of an earlier one says of it before any training."""
    write_pairs(tmp_path / "pairs.jsonl")
    to_evaluate = {"model_name_or_path": settings["output_dir"], "do_train": False, "output_dir": str(tmp_path / "again")}
    kept = {k: v for k, v in settings.items() if k not in ("pooling_mode", "teacher")}
    return kept | to_evaluate | {"validation_file": str(tmp_path / "pairs.jsonl")}


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "eos_token"])
def test_an_encoder_is_pooled_as_it_was_saved(small, tmp_path, mode):
    from bidirect_patch.cli.simcse.model import load_encoder
    from bidirect_patch.cli.simcse.saved_encoder import choose_pooling
    from bidirect_patch.cli.simcse.settings import EncoderArguments

    assert run(small | {"pooling_mode": mode}) == 0
    saved = st.SentenceTransformer(small["output_dir"], device="cpu")

    def read(pooling_mode=None):
        asked = choose_pooling(pooling_mode, small["output_dir"])
        arguments = EncoderArguments(small["output_dir"], lora_r=0, simcse_dropout=0.0, pooling_mode=asked)
        return load_encoder(arguments, {})[0].eval().encode(TEXTS)

    torch.testing.assert_close(torch.tensor(read()), torch.tensor(saved.encode(TEXTS)), rtol=1e-4, atol=1e-5)
    other = "mean" if mode != "mean" else "weighted_mean"
    assert abs(read(pooling_mode=other) - saved.encode(TEXTS)).max() > 1e-3


def test_an_encoder_whose_last_module_would_be_lost_is_refused(small, tmp_path, capsys):
    from sentence_transformers.base.modules import Dense

    assert run(small) == 0
    encoder = st.SentenceTransformer(small["output_dir"], device="cpu")
    encoder.append(Dense(32, 8))
    small |= {"output_dir": str(tmp_path / "dense")}
    encoder.save_pretrained(small["output_dir"])
    assert run(again(small, tmp_path)) == 2
    assert "dense is an encoder with Dense, which would be lost" in capsys.readouterr().err


def test_a_first_token_that_is_left_out_without_being_a_sink_is_refused(small, tmp_path, capsys):
    """As `sweep` writes it."""
    from bidirect_patch.encoder.without_sinks import WithoutSinks

    assert run(small) == 0
    encoder = st.SentenceTransformer(small["output_dir"], device="cpu")
    encoder.insert(1, WithoutSinks(1))
    small |= {"output_dir": str(tmp_path / "left-out")}
    encoder.save_pretrained(small["output_dir"])
    assert run(again(small, tmp_path)) == 2
    assert "an encoder with WithoutSinks(1), which would be lost" in capsys.readouterr().err


def test_the_last_token_is_no_end_token_where_the_tokenizer_adds_none(place, tmp_path, small, capsys):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [Transformer(str(place / "model")), Pooling(32, pooling_mode="lasttoken")]
    small |= {"output_dir": str(tmp_path / "last")}
    st.SentenceTransformer(modules=modules, device="cpu").save_pretrained(small["output_dir"])
    assert run(again(small, tmp_path)) == 2
    assert "pools by lasttoken, as no pooling_mode does here: give one of mean" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "{}", '[{"idx": 0}]'])
def test_a_list_of_modules_that_can_not_be_read(small, tmp_path, capsys, text):
    assert run(small) == 0
    Path(small["output_dir"], "modules.json").write_text(text)
    assert run(again(small, tmp_path)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_old_folder_says_its_pooling_in_its_own_keys(tmp_path):
    from bidirect_patch.cli.simcse.saved_encoder import choose_pooling

    (tmp_path / "1_Pooling").mkdir()
    types = {"": "sentence_transformers.models.Transformer", "1_Pooling": "sentence_transformers.models.Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in types.items()]))
    keys = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | keys))
    assert choose_pooling(None, str(tmp_path)) == "weighted_mean"


def test_an_adapter_is_no_model(settings, place, tmp_path, capsys):
    assert run(again(settings | {"output_dir": str(place / "mntp"), "peft_model_name_or_path": None}, tmp_path)) == 2
    assert "mntp is an adapter: give its base as model_name_or_path" in capsys.readouterr().err


def test_texts_stand_behind_the_token_that_the_adapter_was_trained_behind(small, place, tmp_path, ids_read):
    adapter = str(tmp_path / "adapter")
    flags = {"num_sink_tokens": 1, "sink_token": "eos", "max_steps": 1, "lora_r": 4, "mask_token": "w59", "use_cpu": True}
    flags |= {"line_by_line": True, "report_to": "none", "output_dir": adapter, "cache_dir": small["cache_dir"], "do_train": True}
    flags |= {"model_name_or_path": str(place / "model"), "train_file": str(place / "texts.txt")}
    (tmp_path / "mntp.json").write_text(json.dumps(flags))
    assert main(["mntp", str(tmp_path / "mntp.json")]) == 0
    eos, bos = (AutoTokenizer.from_pretrained(place / "model").convert_tokens_to_ids(token) for token in ("</s>", "<s>"))
    for asked, first in ((None, eos), ("bos", bos)):
        ids_read.clear()
        out = {"output_dir": str(tmp_path / f"out-{asked}"), "sink_token": asked}
        assert run(small | out | {"peft_model_name_or_path": adapter}) == 0
        assert {ids[0] for ids in ids_read} == {first}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_dropout_is_that_of_attention_by_whatever_name(place, tmp_path, dropout):
    from bidirect_patch.cli.simcse.model import load_encoder
    from bidirect_patch.cli.simcse.saving import save_encoder
    from bidirect_patch.cli.simcse.settings import EncoderArguments

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.save_pretrained(tmp_path)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.1, **none)
    GPT2Model(config).save_pretrained(tmp_path)
    arguments = EncoderArguments(model_name_or_path=str(tmp_path), simcse_dropout=dropout, lora_r=0)
    model = load_encoder(arguments, {})[0].train()
    features = model.preprocess(TEXTS[:1])
    one, two = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert torch.equal(one, two) == (dropout == 0)
    save_encoder(load_encoder(arguments, {})[0], str(tmp_path / "out"), 64)
    assert GPT2Config.from_pretrained(tmp_path / "out").attn_pdrop == 0


def test_a_weighted_mean_is_padded_where_every_release_counts_from_the_first_token(small, place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "model", padding_side="left")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((place / "model" / name).read_bytes())
    assert run(small | {"pooling_mode": "weighted_mean", "model_name_or_path": str(tmp_path / "model")}) == 0
    saved = st.SentenceTransformer(small["output_dir"], device="cpu")
    mask = saved.preprocess(TEXTS)["attention_mask"]
    assert mask[:, 0].all() and not mask.all()


def test_instructions_leave_room_for_a_text_in_what_the_result_reads(supervised, tmp_path, capsys):
    (tmp_path / "instructions.json").write_text(json.dumps({name: ["say w1 w2", "w3"] for name in ("one", "two")}))
    few = {"instruction_file": str(tmp_path / "instructions.json"), "encode_max_seq_length": 3}
    assert run(supervised | few) == 2
    assert "encode_max_seq_length=3 leaves none for the text" in capsys.readouterr().err
    assert not Path(supervised["output_dir"]).exists()


def test_a_teacher_with_sinks_is_opened_as_it_was_trained(small, tmp_path):
    from bidirect_patch.checkpoints.guard import opening_sinks
    from bidirect_patch.cli.simcse.teacher import load_teacher
    from bidirect_patch.patch import enable_bidirectional

    assert run(small | {"num_sink_tokens": 1, "num_sinkless_layers": 1}) == 0
    with opening_sinks():
        by_hand = st.SentenceTransformer(small["output_dir"], device="cpu")
    causal = by_hand.encode(TEXTS)
    enable_bidirectional(by_hand, num_sink_tokens=1, num_sinkless_layers=1)
    taught = load_teacher(small["output_dir"]).encode(TEXTS)
    torch.testing.assert_close(torch.tensor(taught), torch.tensor(by_hand.encode(TEXTS)))
    assert abs(taught - causal).max() > 1e-3
