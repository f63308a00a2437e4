"""Sink tokens in MNTP: the collator never hides one, and the head keeps those that it finds."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from bidirect_patch import MNTPCollator, apply_mntp_head, enable_bidirectional, remove_mntp_head

from ..helpers.seeing import reached
from ..helpers.tiny_models import tiny_model
from ..helpers.words import everything_hidden, make_tokenizer, texts


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_all_but_the_first_tokens_of_each_text_are_hidden(count, side):
    tokenizer = make_tokenizer(padding_side=side)
    lengths = [6, 3, 2, 1]
    rows = texts(*lengths)
    batch = everything_hidden(tokenizer, num_sink_tokens=count)(rows)
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"].bool()):
        start = max(1, count)
        given = row["input_ids"]
        assert labels[mask].tolist() == [-100] * min(start, len(given)) + given[start:]
        assert ids[mask].tolist()[:start] == given[:start] and set(ids[mask].tolist()[start:]) <= {3}
        assert set(labels[~mask].tolist()) <= {-100}


@pytest.mark.parametrize("padding_free", [False, True])
def test_each_document_of_a_packed_row_has_its_own(tokenizer, padding_free):
    """And padding within a row counts for none of them."""
    row = {"input_ids": [9, 11, 12, 13, 14, 15, 16, 17, 9], "position_ids": [0, 0, 1, 2, 3, 0, 1, 2, 3]}
    row["attention_mask"] = [0, 1, 1, 1, 1, 1, 1, 1, 0]
    batch = everything_hidden(tokenizer, num_sink_tokens=2, padding_free=padding_free)([row])
    labels = [-100, -100, 13, 14, -100, -100, 17]
    assert batch["labels"][0].tolist() == (labels if padding_free else [-100, *labels, -100])


def test_documents_in_one_row_are_the_texts_by_themselves(tokenizer):
    rows = texts(5, 2, 7)
    packed = everything_hidden(tokenizer, num_sink_tokens=3, padding_free=True)(rows)["labels"][0].tolist()
    alone = [everything_hidden(tokenizer, num_sink_tokens=3)([row])["labels"][0].tolist() for row in rows]
    assert packed == sum(alone, [])


def test_the_other_masks_are_those_of_a_collator_without_sinks(tokenizer):
    rows = texts(9, 8, 7)
    plain, beside = (MNTPCollator(tokenizer, mlm_probability=0.5, seed=3, num_sink_tokens=n)(rows) for n in (0, 2))
    assert torch.equal(plain["labels"][:, 2:], beside["labels"][:, 2:])
    assert torch.equal(plain["input_ids"][:, 2:], beside["input_ids"][:, 2:])
    assert (beside["labels"][:, :2] == -100).all() and (plain["labels"][:, 1] != -100).any()


def test_the_head_keeps_the_sinks_that_it_finds():
    model = enable_bidirectional(tiny_model("llama"), num_sink_tokens=2, num_sinkless_layers=1)
    before = reached(model)
    for change in (apply_mntp_head, apply_mntp_head, remove_mntp_head):
        change(model)
        assert torch.equal(reached(model), before)
    assert not before[0, 1] and not before[1, 2:].any() and before[2:, 2:].all() and before[2:, :2].all()
    plain = apply_mntp_head(tiny_model("llama"))
    assert reached(plain).all()
    enable_bidirectional(plain, num_sink_tokens=1)
    assert not reached(apply_mntp_head(plain))[0, 1:].any()


def test_a_bare_model_keeps_them_in_its_head():
    bare = enable_bidirectional(tiny_model("llama", head=False), num_sink_tokens=1)
    model = apply_mntp_head(bare).eval()
    assert not reached(model)[0, 1:].any() and reached(model)[1:].all()


def test_a_trainer_of_ones_own(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs the extra [train]")
    tokenizer = make_tokenizer()
    model = enable_bidirectional(tiny_model("llama", vocab_size=len(tokenizer)), num_sink_tokens=1)
    collator = MNTPCollator(tokenizer, num_sink_tokens=1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", dataloader_pin_memory=False
    )
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    Trainer(apply_mntp_head(model), arguments, data_collator=collator, train_dataset=texts(*[6] * 16)).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert not reached(model.eval())[0, 1:].any()
