"""A model of which some layers are bidirectional and others are not is an error, until it is enabled or disabled again."""

import contextlib
import copy
import threading
from functools import partial

import pytest
import torch

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ModeConflictError, OrderError
from bidirect_patch.swap.classes import is_open
from bidirect_patch.swap.record import plans_of

from ..helpers import zoo
from ..helpers.one_text import moved_by_last
from ..helpers.tiny_models import tiny_model

IDS = torch.arange(5, 14)[None]
moved = partial(moved_by_last, ids=IDS)


def put_back():
    """A layer was taken out while the model was undone, and put back."""
    model = enable_bidirectional(tiny_model())
    layer = model.model.layers.pop(1)
    disable_bidirectional(model)
    model.model.layers.insert(1, layer)
    return model, "layers.1.self_attn is bidirectional"


def copied_in():
    """A copy of a bidirectional layer in a causal model."""
    model = tiny_model()
    model.model.layers[0] = copy.deepcopy(enable_bidirectional(tiny_model()).model.layers[0])
    return model, "layers.0.self_attn is bidirectional"


def causal_one():
    """A causal layer in a bidirectional model."""
    model = enable_bidirectional(tiny_model())
    model.model.layers[1] = tiny_model().model.layers[1]
    return model, "layers.1.self_attn isn't bidirectional"


def appended():
    """One layer more than there were."""
    model = enable_bidirectional(tiny_model())
    layer = tiny_model().model.layers[1]
    layer.self_attn.layer_idx = 2  # the KV cache of `generate` counts layers
    model.model.layers.append(layer)
    return model, "layers.2.self_attn isn't bidirectional"


def shared():
    """The layers belong to another model, which was enabled."""
    model, other = tiny_model(), tiny_model()
    other.model.layers = model.model.layers
    enable_bidirectional(other)
    assert moved(other).all()
    return model, "layers.0.self_attn, layers.1.self_attn is bidirectional"


@pytest.fixture(params=[put_back, copied_in, causal_one, appended, shared], ids=lambda make: make.__name__)
def mixed(request):
    return request.param()


def test_it_neither_runs_nor_generates_nor_is_saved(mixed, tmp_path):
    model, names = mixed
    assert not is_bidirectional(model)
    for use in (
        lambda: model(input_ids=IDS),
        lambda: model.model(input_ids=IDS, attention_mask=torch.ones_like(IDS)),
        lambda: model.generate(IDS, max_new_tokens=1),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(OrderError, match=f"{names}.*enable_bidirectional.*disable_bidirectional"):
            use()
    assert not list(tmp_path.iterdir())


def test_it_is_whole_again_once_it_is_enabled_or_disabled(mixed):
    model, _ = mixed
    with bidirectional(copy.deepcopy(model)) as inside:
        assert moved(inside).all()
    twin = copy.deepcopy(model)
    assert moved(enable_bidirectional(model)).all() and is_bidirectional(model)
    assert not moved(disable_bidirectional(twin))[:-1].any()
    twin.generate(IDS, max_new_tokens=1, do_sample=False, pad_token_id=0)


def put_on(model):
    """What the patch has put on each module, and the hooks by which labels are looked at."""
    return {name: (type(m), plans_of(m), len(m._forward_pre_hooks)) for name, m in model.named_modules()}


@pytest.mark.parametrize("inside", ["bidirectional", "with sinks", "causal", "nested"])
def test_a_block_is_whole_inside_and_leaves_the_mixture_that_it_found(mixed, inside):
    model, names = mixed
    before = put_on(model)
    sinks = {"num_sink_tokens": 2} if inside == "with sinks" else {}
    hidden = {"causal": 8, "with sinks": 2}.get(inside, 0)
    for error in (None, KeyError, KeyboardInterrupt):
        with contextlib.suppress(error or ()), bidirectional(model, inside != "causal", **sinks):
            if inside == "nested":
                for enabled in (False, True):
                    with bidirectional(model, enabled):
                        assert moved(model)[:-1].all() == enabled
            assert is_bidirectional(model) == (inside != "causal")
            assert moved(model).tolist() == [False] * hidden + [True] * (9 - hidden)
            if error:
                raise error
        assert put_on(model) == before
    with pytest.raises(OrderError, match=f"{names}.*enable_bidirectional.*disable_bidirectional"):
        model(input_ids=IDS)
    assert moved(enable_bidirectional(model)).all()
    assert not moved(disable_bidirectional(model))[:-1].any()


@pytest.mark.parametrize("layers", [[1], pytest.param([0, 1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("sinks", [0, 1])
def test_a_causal_flag_that_somebody_sets_is_an_error_until_it_is_enabled_or_disabled_again(layers, sinks, tmp_path):
    model = enable_bidirectional(tiny_model(), num_sink_tokens=sinks)
    compiled = torch.compile(model, backend="eager")
    for layer in layers:
        model.model.layers[layer].self_attn.is_causal = True
    assert not is_bidirectional(model)
    for use in (
        lambda: model(input_ids=IDS),
        lambda: compiled(input_ids=IDS),
        lambda: model.generate(IDS, max_new_tokens=1),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(OrderError, match="Attention.is_causal was set to True.*enable_bidirectional.*disable_bidirectional"):
            use()
    assert not list(tmp_path.iterdir())
    twin = copy.deepcopy(model)
    for again in (lambda: bidirectional(copy.deepcopy(model), num_sink_tokens=sinks), lambda: contextlib.nullcontext(model)):
        with again() as opened:
            assert moved(enable_bidirectional(opened, num_sink_tokens=sinks)).tolist() == [False] * sinks + [True] * (9 - sinks)
    assert is_bidirectional(model)
    assert not moved(disable_bidirectional(twin))[:-1].any()
    stock = tiny_model()
    for name, module in stock.named_modules():
        assert getattr(module, "is_causal", None) == getattr(twin.get_submodule(name), "is_causal", None)


def test_a_block_leaves_what_another_model_made_of_shared_layers():
    model, other = tiny_model(), tiny_model()
    other.model.layers = model.model.layers
    enable_bidirectional(other, num_sink_tokens=1)
    for enabled in (True, False):
        with bidirectional(model, enabled):
            assert moved(model)[:-1].all() == enabled
        assert moved(other).tolist() == [False] + [True] * 8
    with bidirectional(tiny_model()), bidirectional(other, num_sink_tokens=2):
        with bidirectional(model):
            assert moved(model).all()
        assert moved(other).tolist() == [False] * 2 + [True] * 7


@pytest.mark.parametrize("enabled", [True, False])
def test_a_block_on_a_model_leaves_the_decoder_in_it_that_alone_was_enabled(enabled):
    """The model around it makes a mask for it too."""
    if "gemma3" not in zoo.model_types():
        pytest.skip("this transformers has no composite Gemma 3")
    model = zoo.build("gemma3")
    inner = getattr(model, "model", model).language_model
    enable_bidirectional(inner, num_sink_tokens=1)
    before, want = put_on(model), inner(input_ids=IDS)[0]
    with bidirectional(model, enabled):
        assert is_bidirectional(model) == enabled
    assert put_on(model) == before and is_bidirectional(inner)
    assert torch.equal(inner(input_ids=IDS)[0], want)


def test_another_thread_keeps_what_it_runs_of_a_model_that_alone_was_enabled():
    if "gemma3" not in zoo.model_types():
        pytest.skip("this transformers has no composite Gemma 3")
    model = zoo.build("gemma3")
    inner = getattr(model, "model", model).language_model
    enable_bidirectional(inner)
    begun, leave = threading.Event(), threading.Event()
    inner.layers[0].register_forward_pre_hook(lambda *_: (begun.set(), leave.wait(20)) and None)
    thread = threading.Thread(target=lambda: inner(input_ids=IDS), daemon=True)
    thread.start()
    assert begun.wait(20)
    try:
        for enabled in (True, False):
            with pytest.raises(ModeConflictError, match="bidirectional in part"), bidirectional(model, enabled):
                pass
    finally:
        leave.set()
        thread.join(20)


def test_a_causal_block_that_could_not_be_left_is_not_entered():
    """A wrapper that looks into its input shows nothing of what it calls."""
    model = enable_bidirectional(tiny_model(head=False))
    attention = model.layers[1].self_attn
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs) if (args or [kwargs["hidden_states"]])[0].shape else None
    with pytest.raises(OrderError, match="nothing shows that this calls the patched forward"), bidirectional(model, False):
        raise AssertionError("the block was entered")
    assert moved(model).all()
    del attention.forward
    assert moved(model).all() and is_bidirectional(model)


def test_a_layer_that_comes_into_a_causal_block_is_as_the_blocks_inside_say():
    model = enable_bidirectional(tiny_model())
    with bidirectional(model, enabled=False):
        layer, open_ = model.model.layers[0], copy.deepcopy(enable_bidirectional(tiny_model()).model.layers[0])
        model.model.layers[0] = open_
        for enabled in (True, False):
            with bidirectional(model, enabled):
                assert moved(model)[:-1].all() == enabled
            assert is_open(open_.self_attn) and not moved(model)[:-1].any()  # as the block says
        model.model.layers[0] = layer
        assert not moved(model)[:-1].any()
    assert moved(model).all() and is_bidirectional(model)


@pytest.mark.parametrize("how", ["enable", "block"])
@pytest.mark.parametrize("put_in", ["another layer", "a layer without sinks"])
def test_a_layer_of_other_sinks_is_brought_to_those_asked_for(put_in, how):
    sinks = {"num_sink_tokens": 1, "num_sinkless_layers": 1}
    model, twin = tiny_model(), tiny_model()
    twin.model.layers[1] = copy.deepcopy(twin.model.layers[0])
    want = enable_bidirectional(twin, **sinks)(input_ids=IDS)[0]
    open_ = enable_bidirectional(tiny_model()).model.layers[0]
    enable_bidirectional(model, **sinks)
    model.model.layers[1] = copy.deepcopy(model.model.layers[0] if put_in == "another layer" else open_)
    if how == "enable":
        assert torch.equal(enable_bidirectional(model, **sinks)(input_ids=IDS)[0], want)
    else:
        with bidirectional(model, **sinks):
            assert torch.equal(model(input_ids=IDS)[0], want)


def test_what_is_no_mixture_runs_as_before():
    """A forward that was taken before, a layer by itself, fewer layers than there were."""
    model = tiny_model(head=False)
    forward = model.forward
    enable_bidirectional(model)
    assert moved(forward).all()
    hidden = torch.randn(1, 5, 32)
    seen = []
    handle = model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(inputs_embeds=hidden)
    handle.remove()
    args, kwargs = seen[0]
    model.layers[0](*args, **kwargs)
    del model.layers[1]
    assert moved(model).all()
