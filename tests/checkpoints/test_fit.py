"""An adapter on a model that is not as it was trained: each kind of model, each kind of adapter, with `auto` and without.

What a warning says is compared with what the model does: which outputs the last token moves, and the first. Who does what it says
to do has the model that was saved.
"""

import contextlib
import copy
import threading
import warnings

import pytest
import torch

from bidirect_patch import bidirectional, enable_bidirectional
from bidirect_patch.errors import ModeConflictError, OrderError, UnsupportedModelError
from bidirect_patch.model.sinks import Sinks

from ..helpers import zoo
from ..helpers.saved import encode, load_adapter, lora, same
from ..helpers.tiny_models import tiny_model

IDS = torch.arange(5, 14)[None]
NONE, OURS, OTHERS = Sinks(), Sinks(1, 2), Sinks(2, 0)
ADAPTERS = {"causal": None, "bidirectional": NONE, "with sinks": OURS}
WAYS = ("peft", "transformers")


def attends(model):
    """What the last token moves, and the first."""
    moved = []
    for at in (-1, 0):
        other = IDS.clone()
        other[0, at] = 40
        with torch.no_grad():
            difference = (model(input_ids=IDS)[0] - model(input_ids=other)[0])[0].abs().amax(-1)
        moved.append("".join(str(int(each > 1e-6)) for each in difference))
    return tuple(moved)


# Of what a warning says a model is: what it does.
SAID = {
    "causal": ("000000001", "111111111"),
    "bidirectional with no sink tokens": ("111111111", "111111111"),
    "bidirectional with num_sink_tokens=1, num_sinkless_layers=2": ("011111111", "100000000"),
    "bidirectional with num_sink_tokens=2, num_sinkless_layers=0": ("001111111", "111111111"),
}
CAUSAL, OPEN, WITH_OURS, WITH_OTHERS = SAID
IN_PART = "bidirectional in part"


def is_open(sinks=NONE):
    return enable_bidirectional(tiny_model(), **sinks._asdict())


def in_part():
    model = is_open()
    model.model.layers[1] = copy.deepcopy(tiny_model().model.layers[1])
    return model


# A model, the blocks that it is in, what it is then, and what it is after them (None: there are none).
MODELS = {
    "causal": (tiny_model, [], CAUSAL, None),
    "bidirectional": (is_open, [], OPEN, None),
    "with the adapter's sinks": (lambda: is_open(OURS), [], WITH_OURS, None),
    "with other sinks": (lambda: is_open(OTHERS), [], WITH_OTHERS, None),
    "in part": (in_part, [], IN_PART, None),
    "causal, in a causal block": (tiny_model, [False], CAUSAL, CAUSAL),
    "bidirectional, in a causal block": (is_open, [False], CAUSAL, OPEN),
    "with the adapter's sinks, in a causal block": (lambda: is_open(OURS), [False], CAUSAL, WITH_OURS),
    "with other sinks, in a causal block": (lambda: is_open(OTHERS), [False], CAUSAL, WITH_OTHERS),
    "in part, in a causal block": (in_part, [False], CAUSAL, IN_PART),
    "causal, in a bidirectional block": (tiny_model, [NONE], OPEN, CAUSAL),
    "with other sinks, in a bidirectional block": (lambda: is_open(OTHERS), [NONE], OPEN, WITH_OTHERS),
    "causal, in a block with other sinks": (tiny_model, [OTHERS], WITH_OTHERS, CAUSAL),
    "causal, in two blocks": (tiny_model, [OURS, False], CAUSAL, CAUSAL),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each adapter: the folder that it is saved in, and what its model gives."""
    pytest.importorskip("peft")
    made = {}
    for name, sinks in ADAPTERS.items():
        model = lora(tiny_model())
        if sinks is not None:
            enable_bidirectional(model, **sinks._asdict())
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        made[name] = folder, encode(model)
    return made


def open_blocks(model, blocks):
    stack = contextlib.ExitStack()
    for mode in blocks:
        stack.enter_context(bidirectional(model, mode is not False, **(mode or NONE)._asdict()))
    return stack


def is_what_is_said(model, said):
    if said == IN_PART:
        with pytest.raises(OrderError):
            attends(model)
    else:
        assert attends(model) == SAID[said]


def loaded(model, folder, through):
    """The model with the adapter, and what was said of it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = load_adapter(model, folder, through)
    return result, [told for told in told if "the adapter" in str(told.message)]


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_without_auto_what_is_said_is_true_and_helps(saved, only_warns, name, adapter, through):
    (make, blocks, now, after), sinks, (folder, want) = MODELS[name], ADAPTERS[adapter], saved[adapter]
    model = make()
    stack = open_blocks(model, blocks)
    with stack:
        model, told = loaded(model, folder, through)
        is_what_is_said(model, now)
    is_what_is_said(model, after or now)
    if sinks is None or f"bidirectional with {sinks.described}" in (now, after):
        assert not told
        return
    (told,) = told
    numbers = f", {sinks.in_words}" if any(sinks) else ""
    it = now if after is None else f"{now} within a block, and {after} after it"
    when = " after the block" if blocks else ""
    assert str(told.message) == (
        f"the adapter {folder} was trained with bidirectional attention and {sinks.described}, and is loaded onto a model that "
        f"is {it}: call enable_bidirectional(model{numbers}){when}, or import bidirect_patch.auto before loading"
    )
    assert told.filename.endswith("saved.py"), "the line that loads, of this package's user"
    same(encode(enable_bidirectional(model, **sinks._asdict())), want)


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_with_auto_a_block_keeps_its_mode_and_then_the_model_is_as_the_adapter_says(saved, auto, name, adapter, through):
    (make, blocks, now, after), sinks, (folder, want) = MODELS[name], ADAPTERS[adapter], saved[adapter]
    model = make()
    with open_blocks(model, blocks):
        model, told = loaded(model, folder, through)
        if blocks or sinks is None:
            is_what_is_said(model, now)
    if sinks is None:
        is_what_is_said(model, after or now)
        assert not told
        return
    same(encode(model), want)
    with bidirectional(model, enabled=False):
        assert attends(model) == SAID[CAUSAL]
    same(encode(model), want)
    lost = after or now
    if lost in (WITH_OURS, WITH_OTHERS) and lost != f"bidirectional with {sinks.described}":
        (told,) = told
        assert str(told.message).startswith(
            f"the adapter {folder} belongs to a model with {sinks.described}, and is loaded onto one with "
            f"{lost.removeprefix('bidirectional with ')}, which is changed to the adapter's"
        )
        assert told.filename.endswith("saved.py")
    else:
        assert not told


def test_with_auto_blocks_may_end_in_any_order(saved, auto):
    folder, want = saved["with sinks"]
    model = tiny_model()
    first, second = bidirectional(model, enabled=False), bidirectional(model, enabled=False)
    first.__enter__()
    second.__enter__()
    with_adapter, _ = loaded(model, folder, "peft")
    first.__exit__(None, None, None)
    assert attends(with_adapter) == SAID[CAUSAL]
    second.__exit__(None, None, None)
    same(encode(with_adapter), want)


def test_with_auto_another_threads_causal_block_keeps_its_mode_and_the_loader_is_told(saved, auto):
    """Else the one who loaded it would run a causal model without a word."""
    folder, want = saved["with sinks"]
    model, entered, leave, seen = tiny_model(), threading.Event(), threading.Event(), []

    def hold():
        with bidirectional(model, enabled=False):
            entered.set()
            leave.wait(20)
            seen.append(attends(model))

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert entered.wait(20)
    with pytest.raises(ModeConflictError):
        loaded(model, folder, "peft")
    leave.set()
    thread.join(20)
    assert seen == [SAID[CAUSAL]]
    with_adapter, _ = loaded(tiny_model(), folder, "peft")
    same(encode(with_adapter), want)


def test_with_auto_what_can_not_be_is_said_at_once(saved, auto):
    """And not at the end of the block, which brings back what it found."""
    folder, _ = saved["with sinks"]
    model = tiny_model(num_hidden_layers=1)
    with bidirectional(model, enabled=False):
        with pytest.raises(TypeError, match="num_sinkless_layers=2, and LlamaModel has 1 layers"):
            load_adapter(model, folder, "peft")
        assert attends(model) == SAID[CAUSAL]
    assert attends(model) == SAID[CAUSAL]


@pytest.mark.skipif("lfm2" not in zoo.model_types(), reason="this transformers has no LFM2")
def test_a_model_of_which_a_part_alone_can_be_bidirectional(tmp_path, only_warns):
    pytest.importorskip("peft")
    enable_bidirectional(lora(zoo.build("lfm2")), allow_partial=True).save_pretrained(tmp_path)
    model, told = loaded(zoo.build("lfm2"), tmp_path, "peft")
    assert "onto a model that is causal: call enable_bidirectional(model, allow_partial=True)" in str(told[0].message)
    with pytest.raises(UnsupportedModelError):
        enable_bidirectional(model)
    _, told = loaded(enable_bidirectional(zoo.build("lfm2"), allow_partial=True), tmp_path, "peft")
    assert not told
