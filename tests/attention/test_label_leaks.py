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
    transition,
)
from bidirect_patch.errors import UnsupportedModelError

from ..helpers.heads import trainer_arguments
from ..helpers.one_text import CAUSAL, IDS, moves
from ..helpers.tiny_models import causal_lm
from ..helpers.twins import leftovers


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


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


def at_once(model):
    enable_bidirectional(model, num_sink_tokens=1)


def in_a_block(model):
    with bidirectional(model, num_sink_tokens=1):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("change", [at_once, in_a_block])
@pytest.mark.parametrize("found", ["causal", "decoder alone", "bidirectional"])
@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("step, error", [
    ("verify", UnsupportedModelError("refused")),
    ("watch_labels", KeyboardInterrupt),
    ("watch_labels, half", KeyboardInterrupt),
    ("verify_now", UnsupportedModelError("refused at last")),
    ("verify_now", KeyboardInterrupt),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_change_that_failed_leaves_the_labels_looked_at_as_before(monkeypatch, change, found, judged, step, error):
    model = causal_lm()
    if found != "causal":
        enable_bidirectional(model if found == "bidirectional" else model.model, num_sink_tokens=2)
    expected = found != "causal" and not judged
    if judged:
        leaks(model)
    hooks, moved = watched(model), moves(model)
    with monkeypatch.context() as patch:
        if step == "verify_now":
            patch.setattr(transition, "verify", lambda *args, **kwargs: None)
            patch.setattr(transition, "verify_now", raises(error))
        elif step == "watch_labels, half":
            stock = transition.watch_labels
            patch.setattr(transition, "watch_labels", lambda modules: stock(modules) or raises(error)())
        else:
            patch.setattr(transition, step, raises(error))
        with pytest.raises(error if isinstance(error, type) else type(error)):
            change(model)
    assert watched(model) == hooks and moves(model) == moved
    assert [leaks(model) for _ in range(2)] == [expected, 0]
    if found == "bidirectional":
        assert watched(model) == [1]
    disable_bidirectional(model)
    assert not watched(model) and moves(model) == CAUSAL and not leftovers(model)


def test_a_block_leaves_the_labels_looked_at_as_before():
    """They are looked at where a model was enabled, and a model is told of them once, whatever blocks there are."""
    model = causal_lm()
    enable_bidirectional(model.model)
    hooks = watched(model)
    for sinks in (0, 1):
        with bidirectional(model, num_sink_tokens=sinks), bidirectional(model, enabled=False):
            pass
        assert watched(model) == hooks
    assert [leaks(model) for _ in range(2)] == [1, 0]
    model = enable_bidirectional(causal_lm())
    assert leaks(model) == 1
    with bidirectional(model, enabled=False):
        assert leaks(model) == 0
    with bidirectional(model, num_sink_tokens=1):
        assert leaks(model) == 0
    assert leaks(model) == 0
    with bidirectional(model, enabled=False):
        disable_bidirectional(model)
        enable_bidirectional(model)
    assert watched(model) == [1]


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
