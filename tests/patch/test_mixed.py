"""A model of which some layers are bidirectional and others are not is an error, until it is enabled or disabled again."""

import copy
from functools import partial

import pytest
import torch

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import OrderError

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
