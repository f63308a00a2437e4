"""Models and labels that the MNTP head refuses, and labels that leak."""

import inspect
import warnings

import pytest
import torch
import transformers
from packaging.version import Version

from bidirect_patch import apply_mntp_head, is_bidirectional
from bidirect_patch.errors import AttentionMaskError, HeadError, LabelLeakWarning, UnsupportedModelError

from ..helpers.heads import VOCAB, batch
from ..helpers.tiny_models import tiny_config, tiny_model
from ..helpers.versions import TRANSFORMERS


@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_packed_rows_of_a_model_that_drops_positions_are_refused(family):
    names = {"Bloom": ("n_layer", "n_head", "hidden_size"), "Mpt": ("n_layers", "n_heads", "d_model")}[family]
    config = getattr(transformers, f"{family}Config")(**dict(zip(names, (2, 4, 32))), vocab_size=VOCAB)
    model = apply_mntp_head(getattr(transformers, f"{family}ForCausalLM")(config))
    inputs = batch(shape=(1, 8))
    if not {"position_ids", "kwargs", "deprecated_arguments"} & set(inspect.signature(type(model).forward).parameters):
        pytest.skip("this transformers refuses position_ids by itself")
    model(**inputs, position_ids=torch.arange(8)[None])
    padded = dict(attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]]))
    model(**inputs, **padded)  # one document, padded on the left
    for positions in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6]):
        for given in (inputs, {"input_ids": inputs["input_ids"]}):  # without labels a Trainer smooths its loss itself
            with pytest.raises(AttentionMaskError, match="takes no position_ids"):
                model(**given, position_ids=torch.tensor([positions]))


BART = dict(vocab_size=61, d_model=16, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2)


def test_errors_come_before_any_change():
    for model in (
        torch.nn.Linear(2, 2),
        transformers.LlamaForSequenceClassification(tiny_config("llama")),
        torch.nn.ModuleList([tiny_model(head=False)]),
        transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
        transformers.BartForCausalLM(transformers.BartConfig(**BART)),  # whose loss has no shift
        "Llama",
    ):
        with pytest.raises(HeadError):
            apply_mntp_head(model)
        if isinstance(model, torch.nn.Module):
            assert not any(hasattr(m, "_original") for m in model.modules())
    model = tiny_model()
    with pytest.raises(HeadError, match="'all'"):
        apply_mntp_head(model, eval_logits="all")
    assert not is_bidirectional(model)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError):
        apply_mntp_head(mamba)
    assert type(mamba) is transformers.MambaForCausalLM


@pytest.mark.parametrize("wrong", [dict(labels=slice(0, 1)), dict(logits_to_keep=4)], ids=["fewer-labels", "logits-to-keep"])
def test_labels_that_fit_no_row_are_refused(wrong):
    """Picked by their place, they would score the wrong positions without a word."""
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    if "labels" in wrong:
        inputs["labels"] = inputs["labels"][wrong["labels"]]
    else:
        inputs.update(wrong)
    with pytest.raises(HeadError, match="labels"):
        model(**inputs)


def test_labels_may_be_of_any_integer_and_of_nothing_else():
    model, inputs = apply_mntp_head(tiny_model()), batch()
    expected = model(**inputs).loss
    assert torch.equal(model(**{**inputs, "labels": inputs["labels"].int()}).loss, expected)
    for wrong, said in ((inputs["labels"].float(), "float32"), (inputs["labels"].tolist(), "list")):
        with pytest.raises(HeadError, match=said):
            model(**{**inputs, "labels": wrong})


@pytest.mark.skipif(TRANSFORMERS >= Version("4.47"), reason="this transformers calls the head whatever pretraining_tp says")
def test_a_head_that_is_sliced_instead_of_called_is_refused():
    model = tiny_model(pretraining_tp=2)
    with pytest.raises(HeadError, match="pretraining_tp = 1"):
        apply_mntp_head(model)
    assert not is_bidirectional(model)
    model.config.pretraining_tp = 1
    apply_mntp_head(model)


@pytest.mark.parametrize("wrong, said", [(VOCAB, f"the id {VOCAB}: give ids from 0 below {VOCAB}"), (-1, "the id -1")])
@pytest.mark.parametrize("plain", [True, False])
def test_labels_that_are_no_ids_are_refused(plain, wrong, said):
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    if not plain:
        model.lm_head.register_forward_hook(lambda *a: None)
    inputs["labels"][0, 0] = wrong  # nothing predicts it
    model(**inputs)
    inputs["labels"][1, 3] = wrong
    with pytest.raises(HeadError, match=said):
        model(**inputs)


@pytest.mark.parametrize("items", ["3", [3], -3, torch.tensor([1, 2])], ids=repr)
def test_a_number_of_items_that_is_none_is_refused(items):
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    with pytest.raises(HeadError, match="num_items_in_batch") as refused:
        model(**inputs, num_items_in_batch=items)
    assert repr(items) in str(refused.value)


@pytest.mark.parametrize("shape", [(51,), (3, 17, 1)], ids=str)
def test_labels_of_other_dimensions_are_refused(shape):
    inputs = batch()
    model = apply_mntp_head(tiny_model().train())
    with pytest.raises(HeadError, match="labels"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"].reshape(shape))
    with pytest.raises(HeadError, match="labels must have the shape"):
        model(labels=inputs["labels"].reshape(shape))


def test_arguments_by_place_are_those_of_the_stock_forward():
    model, inputs = apply_mntp_head(tiny_model().train()), batch()
    mask = torch.ones_like(inputs["input_ids"])
    names = [name for name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters if name != "self"]
    given = {**inputs, "attention_mask": mask}
    places = [given.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(model(*places).loss, model(**given).loss)
    with pytest.raises(TypeError, match="input_ids"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"])
    with pytest.raises(TypeError, match="positional"):
        model(inputs["input_ids"], *[None] * 40)


def test_labels_that_leak_are_told_of():
    inputs = batch()
    model = apply_mntp_head(tiny_model().train())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelLeakWarning)
        model(**inputs)
        model(input_ids=inputs["labels"].clamp(min=0), attention_mask=None)
    leaking = apply_mntp_head(tiny_model().train())
    with pytest.warns(LabelLeakWarning, match="copy"):
        leaking(input_ids=inputs["input_ids"], labels=inputs["input_ids"])
