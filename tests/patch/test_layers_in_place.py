"""A layer that was put where the sink tokens of its model ask for another one is an error, until the model is enabled again."""

import contextlib
import copy
import io
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import OrderError, UnsupportedModelError

from ..helpers.explicit_masks import sink_masks, under
from ..helpers.one_text import BOTH, CAUSAL, IDS, moves, output
from ..helpers.tiny_models import tiny_model
from ..helpers.twins import leftovers

SINKS = {"num_sink_tokens": 1, "num_sinkless_layers": 1}
make = partial(tiny_model, num_hidden_layers=3)


def model_with_sinks(tokens=1, sinkless=1, seed=0):
    return enable_bidirectional(make(seed=seed), num_sink_tokens=tokens, num_sinkless_layers=sinkless)


def copied(model):
    """A layer that sees the sinks in the place of the last."""
    model.model.layers[2] = copy.deepcopy(model.model.layers[0])


def copied_up(model):
    """The last layer in another place too."""
    model.model.layers[0] = copy.deepcopy(model.model.layers[2])


def reordered(model):
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def cut(model):
    model.model.layers = model.model.layers[:2]


def added(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1  # Llama runs no more layers than that


def without_sinks(model):
    model.model.layers[0] = enable_bidirectional(make(seed=1)).model.layers[0]


def of_other_sinks(model):
    model.model.layers[1] = model_with_sinks(2, 1, seed=1).model.layers[1]


def attention_of_other_sinks(model):
    model.model.layers[0].self_attn = model_with_sinks(2, 2, seed=1).model.layers[0].self_attn


def shared_with_other_sinks(model):
    other = make(seed=1)
    other.model.layers = model.model.layers
    enable_bidirectional(other, num_sink_tokens=2, num_sinkless_layers=1)


def wrapped_in_another_place(model):
    """A compiled layer, which has its attention one step further inside."""
    model.model.layers[2] = torch.compile(copy.deepcopy(model.model.layers[0]), backend="eager")


CHANGES = [copied, copied_up, reordered, cut, added, without_sinks, of_other_sinks, attention_of_other_sinks]
CHANGES += [shared_with_other_sinks, wrapped_in_another_place]
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
refused = partial(pytest.raises, OrderError, match="num_sink_tokens=1, num_sinkless_layers=1.*disable_bidirectional")


def stock_twin(model):
    """A model of the same layers that was never patched."""
    twin = tiny_model(num_hidden_layers=len(model.model.layers))
    twin.load_state_dict({name.replace("_orig_mod.", ""): weight for name, weight in model.state_dict().items()})
    return twin


def explicit(model, sinks=1, sinkless=1):
    twin = stock_twin(model)
    with under(twin.model.layers, sink_masks(IDS.shape[1], len(twin.model.layers), sinks, sinkless)):
        return output(twin, use_cache=False)


@each_change
def test_it_neither_runs_nor_is_saved_until_it_is_enabled_again(change, tmp_path):
    model = model_with_sinks()
    change(model)
    assert not is_bidirectional(model)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    opened = torch.load(buffer, weights_only=False)
    for use in (
        lambda: model(input_ids=IDS),
        lambda: model.model(input_ids=IDS),
        lambda: model.save_pretrained(tmp_path),
        lambda: copy.deepcopy(model)(input_ids=IDS),
        lambda: opened(input_ids=IDS),
    ):
        with refused():
            use()
    assert not list(tmp_path.iterdir()) and not is_bidirectional(opened)
    want = explicit(model)
    torch.testing.assert_close(output(enable_bidirectional(model, **SINKS)), want, atol=1e-4, rtol=1e-4)
    assert is_bidirectional(model)


@each_change
def test_a_block_is_whole_inside_and_leaves_it_as_it_was_found(change):
    model = model_with_sinks()
    change(model)
    want = {enabled: explicit(model) if enabled else output(stock_twin(model), use_cache=False) for enabled in (True, False)}
    for error in (None, KeyError):
        for enabled in (True, False):
            with contextlib.suppress(error or ()), bidirectional(model, enabled, **(SINKS if enabled else {})):
                # a copy of a layer would write into the other's KV cache
                torch.testing.assert_close(output(model, use_cache=False), want[enabled], atol=1e-4, rtol=1e-4)
                assert is_bidirectional(model) == enabled
                if error:
                    raise error
            with refused():
                model(input_ids=IDS)
    twin = stock_twin(model)
    disable_bidirectional(model)
    assert moves(model, use_cache=False) == CAUSAL and not leftovers(model)
    torch.testing.assert_close(output(model, use_cache=False), output(twin, use_cache=False), atol=1e-5, rtol=1e-5)


def test_a_layer_used_twice_is_no_other_layers_stand_in():
    """All but one of its uses are in a place of the other kind."""
    for one, other in ((0, 2), (2, 0)):
        model = model_with_sinks()
        model.model.layers[other] = model.model.layers[one]
        assert not is_bidirectional(model)
        with refused():
            model(input_ids=IDS)
        assert moves(enable_bidirectional(model)) == BOTH and is_bidirectional(model)


def test_a_layer_of_another_window_is_an_error_and_one_of_the_models_own_windows_is_none():
    """The mask has a channel for each window of the model, and a layer knows its channel by number."""
    model = enable_bidirectional(tiny_model("mistral", sliding_window=None))
    model.model.layers[1] = enable_bidirectional(tiny_model("mistral", sliding_window=3)).model.layers[1]
    assert not is_bidirectional(model)
    with pytest.raises(OrderError, match="another window.*enable_bidirectional"):
        model(input_ids=IDS)
    assert is_bidirectional(enable_bidirectional(model))


@pytest.mark.skipif(not hasattr(transformers, "Gemma2Config"), reason="this transformers has no Gemma 2")
def test_a_layer_keeps_its_own_window_in_another_place():
    from .test_moved_layers import gemma2

    torch.manual_seed(0)
    model, far = enable_bidirectional(gemma2(), num_sink_tokens=1), torch.arange(9)
    twin = gemma2()
    for each in (model, twin):
        each.layers = nn.ModuleList(reversed(each.layers))
    near = (far[:, None] - far).abs() < 3
    masks = sink_masks(9, 2)
    windows = [layer.self_attn.sliding_window for layer in model.layers]
    assert sorted(map(str, windows)) == ["3", "None"]
    with under(twin.layers, [seen & near if window else seen for seen, window in zip(masks, windows)]):
        want = output(twin, use_cache=False)
    torch.testing.assert_close(output(model), want, atol=1e-4, rtol=1e-4)
    assert is_bidirectional(model)


def same_order(model):
    """Copies in the places of what they were copied from."""
    model.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers)


def of_the_same_place(model):
    model.model.layers[2] = model_with_sinks(seed=1).model.layers[2]


def exchanged_below_the_last(model):
    first, second, last = model.model.layers
    model.model.layers = nn.ModuleList([second, first, last])


def cut_from_below(model):
    model.model.layers = model.model.layers[1:]


def compiled_layers(model):
    model.model.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in model.model.layers)


def every_other_compiled(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def with_hooks(model):
    accelerate = pytest.importorskip("accelerate")
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        accelerate.hooks.add_hook_to_module(layer.self_attn, accelerate.hooks.ModelHook())


def with_adapter(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "change",
    [same_order, of_the_same_place, exchanged_below_the_last, cut_from_below, compiled_layers, every_other_compiled, with_hooks]
    + [with_adapter],
    ids=lambda change: change.__name__,
)
def test_layers_that_fit_their_places_run(change):
    model = model_with_sinks()
    change(model)
    if change is with_adapter or change is with_hooks:
        twin = make()
        with under(twin.model.layers, sink_masks(9, 3, 1, 1)):
            want = output(twin, use_cache=False)
    else:
        want = explicit(model)
    torch.testing.assert_close(output(model), want, atol=1e-4, rtol=1e-4)
    assert is_bidirectional(model)


class Around(nn.Module):
    """Somebody's own module around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Around, partial(torch.compile, backend="eager")], ids=["own", "compiled"])
def test_a_wrapper_around_the_attention_alone_is_looked_into(wrap):
    model = model_with_sinks()
    expected = output(model)
    model.model.layers[2].self_attn = wrap(model.model.layers[2].self_attn)
    torch.testing.assert_close(output(model), expected)
    model.model.layers[1].self_attn = wrap(model_with_sinks(2, 1, seed=1).model.layers[1].self_attn)
    with pytest.raises(OrderError, match="has other sink tokens"):
        output(model)


def test_one_attention_in_several_layers_has_no_sinkless_layers():
    """Its last plan would be the plan of all of them."""
    model = make()
    for layer in model.model.layers[1:]:
        layer.self_attn = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedModelError, match="give num_sinkless_layers=0"):
        enable_bidirectional(model, **SINKS)
    assert not leftovers(model)
    assert moves(enable_bidirectional(model)) == BOTH
