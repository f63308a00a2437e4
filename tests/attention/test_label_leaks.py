"""Labels that the input shows to a bidirectional model: a warning, once, whoever takes them."""

import copy
import inspect
import warnings

import pytest
import torch
import transformers

from bidirect_patch import (
    LabelLeakWarning,
    apply_mntp_head,
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
)

from ..helpers.heads import trainer_arguments
from ..helpers.one_text import IDS
from ..helpers.tiny_models import causal_lm


@pytest.mark.parametrize("head", [False, True])
def test_labels_that_leak_are_said_once(head):
    model = (apply_mntp_head if head else enable_bidirectional)(causal_lm())
    with pytest.warns(LabelLeakWarning, match="visible"):
        model(input_ids=IDS, labels=IDS)
    by_position = (apply_mntp_head if head else enable_bidirectional)(causal_lm())
    names = list(inspect.signature(type(causal_lm()).forward).parameters)[1:]
    with pytest.warns(LabelLeakWarning, match="visible"):
        by_position(IDS, *[None] * (names.index("labels") - 1), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, labels=IDS)
        hidden = (apply_mntp_head if head else enable_bidirectional)(causal_lm())
        hidden(input_ids=torch.full_like(IDS, 3), labels=IDS)
        with bidirectional(enable_bidirectional(causal_lm()), enabled=False) as causal:
            causal(input_ids=IDS, labels=IDS)
        causal_lm()(input_ids=IDS, labels=IDS)


def test_labels_are_told_of_once_through_a_wrapper():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = enable_bidirectional(peft.get_peft_model(causal_lm(), settings))
    with pytest.warns(LabelLeakWarning) as told:
        model(input_ids=IDS, labels=IDS)
    assert len([warning for warning in told if warning.category is LabelLeakWarning]) == 1


def leaks(model, labels=IDS):
    """How many warnings a forward with labels gives."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(input_ids=IDS, labels=labels)
    return sum(warning.category is LabelLeakWarning for warning in told)


def test_labels_are_told_of_around_a_decoder_that_alone_was_enabled():
    model = causal_lm()
    enable_bidirectional(model.model)
    with bidirectional(model.model, enabled=False):
        assert leaks(model) == 0
    assert [leaks(model) for _ in range(2)] == [1, 0]
    hidden = causal_lm()
    enable_bidirectional(hidden.model)
    assert leaks(hidden, IDS + 1) == 0
    labels = IDS  # of no model: a bidirectional forward in which nothing is scored  # noqa: F841
    assert leaks(hidden, None) == 0


@pytest.mark.parametrize("enabled", ["model", "decoder"])
def test_labels_are_told_of_by_every_release_of_peft(enabled):
    """PEFT before 0.14 calls the forward of the model that it is put on, and goes around its hooks."""
    peft = pytest.importorskip("peft")
    model = causal_lm()
    enable_bidirectional(model if enabled == "model" else model.model)
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert [leaks(with_adapter) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
@pytest.mark.parametrize("visible", [True, False])
def test_labels_that_trainer_takes_out_are_told_of(how, visible, tmp_path):
    pytest.importorskip("accelerate")
    if how == "compute_loss_func" and how not in inspect.signature(transformers.Trainer).parameters:
        pytest.skip("this Trainer has no compute_loss_func")

    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    row = {"input_ids": IDS[0] if visible else torch.full_like(IDS[0], 3), "labels": IDS[0]}
    smoothing = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    trainer = transformers.Trainer(
        model=enable_bidirectional(causal_lm()),
        args=trainer_arguments(tmp_path, max_steps=2, **smoothing),
        train_dataset=[row] * 4,
        **({} if smoothing else {"compute_loss_func": loss_of}),
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert sum(warning.category is LabelLeakWarning for warning in told) == visible


def watched(model):
    return [len(module._forward_pre_hooks) for module in model.modules() if module._forward_pre_hooks]


def test_nothing_watches_labels_once_no_part_is_bidirectional():
    """Whichever object it was enabled through, and whichever it is disabled through."""
    model = enable_bidirectional(causal_lm())
    assert watched(model)
    disable_bidirectional(model.model)
    assert not watched(model)
    wrapper = torch.nn.ModuleList([enable_bidirectional(model)])
    disable_bidirectional(wrapper)
    assert not watched(model)
    copied = copy.deepcopy(enable_bidirectional(model))
    disable_bidirectional(copied)
    assert not watched(copied) and watched(model)
    with bidirectional(model.model, enabled=False):
        assert watched(model)
    with pytest.warns(LabelLeakWarning):
        model(input_ids=IDS, labels=IDS)
