"""Labels, masks, configs, mixtures and refusals: what failed in real use, each by its kind, seen by changing a token."""

import contextlib
import copy
import inspect
import json
import threading
import warnings

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bidirect_patch import (
    LabelLeakWarning,
    apply_mntp_head,
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
    transition,
)
from bidirect_patch.errors import (
    AttentionMaskError,
    GenerateError,
    OrderError,
    UnsupportedModelError,
)

from ..helpers.heads import trainer_arguments
from .small import (
    BOTH,
    CAUSAL,
    IDS,
    ONES,
    SIZES,
    TRANSFORMERS,
    Version,
    assert_twins,
    causal_lm,
    leftovers,
    llama,
    moves,
    moves_real,
    output,
)

each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])
needs_native = pytest.mark.skipif(
    TRANSFORMERS < Version("5.2"), reason="before 5.2 no config makes a model bidirectional"
)


# Labels


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


def watched(model):
    return [len(module._forward_pre_hooks) for module in model.modules() if module._forward_pre_hooks]


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


# Masks


@pytest.mark.skipif(not hasattr(transformers, "Gemma2Config"), reason="this transformers has no Gemma 2")
def test_a_mask_per_head_is_none_per_window():
    """Two heads and two different windows: the mask's channels are heads all the same."""
    config = transformers.Gemma2Config(**{**SIZES, "num_attention_heads": 2}, head_dim=8, sliding_window=4)
    torch.manual_seed(0)
    model = enable_bidirectional(transformers.Gemma2Model._from_config(config, attn_implementation="eager").eval())
    seen = torch.rand(1, 2, 9, 9) > 0.4
    seen |= torch.eye(9, dtype=torch.bool)
    per_head = output(model, attention_mask=seen)
    swapped = output(model, attention_mask=seen.flip(1))
    assert not torch.allclose(per_head, swapped, atol=1e-5)
    additive = torch.zeros(1, 2, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(output(model, attention_mask=additive), per_head, atol=1e-5, rtol=1e-5)
    both = seen[:, :1].expand(-1, 2, -1, -1)
    torch.testing.assert_close(
        output(model, attention_mask=seen[:, :1]), output(model, attention_mask=both), atol=1e-5, rtol=1e-5
    )


@each_backend
def test_a_bool_mask_means_the_same_on_every_backend(backend):
    model = enable_bidirectional(llama(backend=backend))
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    seen[..., 3] = False
    moved = moves(model, at=3, attention_mask=seen)
    assert moved == "000100000"
    with pytest.raises(AttentionMaskError, match="int64"):
        model(IDS, attention_mask=seen.long())


def test_numbers_of_sequences_are_no_mask_of_ones():
    model = enable_bidirectional(llama())
    with pytest.raises(AttentionMaskError, match="position_ids"):
        model(IDS, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3]]))


# Bidirectional by the config


def gemma3(backend="sdpa", **settings):
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=64, **settings)
    return transformers.Gemma3TextModel._from_config(config, attn_implementation=backend).eval()


@each_backend
@pytest.mark.skipif(TRANSFORMERS < Version("4.57"), reason="Gemma has no use_bidirectional_attention before 4.57")
def test_use_bidirectional_attention_is_known(backend):
    model = gemma3(backend, use_bidirectional_attention=True)
    assert moves(model) == BOTH and is_bidirectional(model)
    enable_bidirectional(model)
    assert moves(model) == BOTH and is_bidirectional(model)
    packed = moves(model, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    assert packed == "000011111"
    with pytest.raises(OrderError, match="use_bidirectional_attention"):
        disable_bidirectional(model)
    assert is_bidirectional(model)


@each_backend
@pytest.mark.skipif(TRANSFORMERS < Version("4.57"), reason="Gemma has no use_bidirectional_attention before 4.57")
def test_what_its_config_makes_bidirectional_in_part_is_never_called_causal(backend):
    """Gemma 1 from 5.2 on, but on eager: without padding it is bidirectional, with padding causal."""
    config = transformers.GemmaConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)
    model = transformers.GemmaModel._from_config(config, attn_implementation=backend).eval()
    stock = moves(model)
    assert not is_bidirectional(model)
    assert moves(enable_bidirectional(model)) == BOTH
    if stock == CAUSAL:
        with bidirectional(model, enabled=False):
            assert moves(model) == CAUSAL
        assert moves(disable_bidirectional(model)) == CAUSAL
        return
    with pytest.raises(OrderError, match="use_bidirectional_attention"):
        disable_bidirectional(model)
    with pytest.raises(OrderError, match="use_bidirectional_attention"), bidirectional(model, enabled=False):
        pass
    assert moves(model) == BOTH and is_bidirectional(model)


@needs_native
def test_disabling_what_its_config_makes_bidirectional_is_an_error():
    model = llama(is_causal=False)
    assert moves(model) == BOTH and is_bidirectional(model)
    with pytest.raises(OrderError, match="is_causal=True"):
        disable_bidirectional(model)
    with bidirectional(model, enabled=False):
        assert moves(model) == CAUSAL and not is_bidirectional(model)


@needs_native
def test_what_is_saved_in_a_causal_block_is_causal(tmp_path):
    model = causal_lm()
    model.config.is_causal = False
    assert is_bidirectional(model)
    with bidirectional(model, enabled=False):
        model.save_pretrained(tmp_path)
    assert is_bidirectional(model) and model.config.is_causal is False
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert moves(opened) == CAUSAL and not is_bidirectional(opened)


@needs_native
def test_edits_and_copies_of_a_config_in_a_causal_block_last():
    model = llama(is_causal=False)
    with bidirectional(model, enabled=False):
        model.config.use_cache = False
        copied = copy.deepcopy(model)
    assert model.config.use_cache is False and model.config.is_causal is False
    assert type(copied.config) is type(model.config) and copied.config.is_causal is True
    disable_bidirectional(copied)
    assert moves(copied) == CAUSAL and moves(model) == BOTH


def test_a_folder_that_llm2vec_saved_is_known(tmp_path, auto):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaBiModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_bidirectional(transformers.AutoModel.from_pretrained(tmp_path))


def test_a_folder_that_llm2vec_saved_is_said_to_be_one(tmp_path, only_warns):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaBiForMNTP"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained with bidirectional attention"):
        transformers.AutoModel.from_pretrained(tmp_path)


# Mixtures


def test_a_model_whose_layers_are_anothers_is_brought_to_one_state():
    a, b = llama(), llama()
    b.layers = a.layers
    enable_bidirectional(a)
    assert not is_bidirectional(b)
    assert moves(enable_bidirectional(b)) == BOTH and is_bidirectional(b) and is_bidirectional(a)
    disable_bidirectional(b)
    assert not is_bidirectional(a) and moves(b) == CAUSAL
    disable_bidirectional(a)
    assert moves(a) == moves(b) == CAUSAL


def test_a_layer_that_was_away_is_brought_along():
    model, twin = llama(), llama()
    twin.load_state_dict(model.state_dict())
    enable_bidirectional(model)
    layer = model.layers.pop(1)
    twin.layers.append(twin.layers.pop(1))
    disable_bidirectional(model)
    model.layers.append(layer)
    assert not is_bidirectional(model)
    assert moves(enable_bidirectional(model)) == BOTH and is_bidirectional(model)
    assert_twins(disable_bidirectional(model), twin)
    model.layers[0] = copy.deepcopy(enable_bidirectional(llama()).layers[0])
    assert not is_bidirectional(model)
    assert moves(disable_bidirectional(model)) == CAUSAL


class Two(torch.nn.Module):
    """Two decoders side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = llama(), llama()


def gemma2():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 2, "head_dim": 16, "sliding_window": 3}
    return transformers.Gemma2Model._from_config(transformers.Gemma2Config(**sizes), attn_implementation="eager").eval()


@pytest.mark.skipif(not hasattr(transformers, "Gemma2Config"), reason=f"transformers {TRANSFORMERS} has no Gemma 2")
def test_a_layer_that_came_in_a_causal_block_is_brought_along():
    """As many heads as windows: a stock layer would take the mask of each window for the mask of a head."""
    want = output(enable_bidirectional(gemma2()))
    model = enable_bidirectional(gemma2())
    with bidirectional(model, enabled=False):
        model.layers[1] = copy.deepcopy(model.layers[1])
    assert is_bidirectional(model)
    torch.testing.assert_close(output(model), want)
    disable_bidirectional(model)
    assert moves(model) == CAUSAL and not leftovers(model)


class CausalLayer(LlamaDecoderLayer):
    """Makes a causal mask of its own."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min).triu(1)[None, None]
        return super().forward(hidden_states, attention_mask=mask, **kwargs)


class QuietLayer(LlamaDecoderLayer):
    """Adds nothing."""


def test_a_layer_of_the_users_own_is_seen_for_itself():
    model, quiet = llama(), llama()
    for i in range(2):
        model.layers[i] = CausalLayer(model.config, i).eval()
        quiet.layers[i] = QuietLayer(model.config, i).eval()
    with pytest.raises(UnsupportedModelError, match="CausalLayer"):
        enable_bidirectional(model)
    assert moves(model) == CAUSAL and not is_bidirectional(model) and not leftovers(model)
    assert moves(enable_bidirectional(quiet)) == BOTH


def test_an_error_in_one_decoder_leaves_the_other_undone():
    model = Two()
    block = bidirectional(model)
    block.__enter__()
    attention = model.a.layers[0].self_attn
    ours = type(attention)
    attention.__class__ = type("SomebodyElses", (ours,), {})
    with pytest.raises(Exception, match="SomebodyElses"):
        block.__exit__(None, None, None)
    assert moves(model.b) == CAUSAL
    attention.__class__ = ours
    thread = threading.Thread(target=disable_bidirectional, args=(model,))
    thread.start()
    thread.join()
    assert moves(model.a) == moves(model.b) == CAUSAL


# Refusals


def test_every_way_to_generate_is_refused():
    model = enable_bidirectional(causal_lm())
    for name in ("generate", "generate_batch"):
        if hasattr(model, name):
            with pytest.raises(GenerateError, match=name):
                getattr(model, name)(IDS)
    for name in ("generate_batch", "init_continuous_batching"):
        if hasattr(model, name):  # they generate in a thread of their own, for which the block does not hold
            with bidirectional(model, enabled=False), pytest.raises(GenerateError, match="disable_bidirectional"):
                getattr(model, name)(IDS.tolist())


@pytest.mark.skipif(not hasattr(LlamaForCausalLM, "init_continuous_batching"), reason="no continuous batching yet")
def test_what_generates_in_a_thread_and_was_made_before_is_refused():
    """It would log an error in its thread, and return nothing."""
    model = causal_lm()
    manager = model.init_continuous_batching()
    enable_bidirectional(model)
    for block in (contextlib.nullcontext(), bidirectional(model, enabled=False)):
        with block:
            with pytest.raises(GenerateError, match="Manager.start was called on a bidirectional model.*causal copy"):
                manager.start()
            with pytest.raises(GenerateError, match="Manager.add_request"):
                manager.add_request(IDS[0].tolist())
    disable_bidirectional(model)
    manager.add_request(IDS[0].tolist())


def test_attention_without_a_mask_is_called_that():
    class PlainAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(32, 32)

        def forward(self, hidden_states, **kwargs):
            return self.proj(hidden_states), None

    model = llama()
    for layer in model.layers:
        layer.self_attn = PlainAttention()
    with pytest.raises(UnsupportedModelError, match="take no mask"):
        enable_bidirectional(model)


@pytest.mark.slow
def test_flex_attention_in_every_order_on_a_cpu():
    if TRANSFORMERS < Version("4.53"):
        pytest.skip("the first release whose FlexAttention runs on a CPU is 4.53")
    torch._dynamo.reset()
    model = llama(backend="flex_attention").requires_grad_(False)
    assert moves(model) == CAUSAL
    enable_bidirectional(model)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert moves(model) == moves(model, attention_mask=ONES) == BOTH
    assert moves_real(model) == BOTH[:7]
    assert moves(model, position_ids=packed) == "000011111"
    ids = torch.arange(3, 24)[None]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert moves(model, ids=ids, attention_mask=mask)[5:] == "1" * 16
    assert moves(disable_bidirectional(model)) == CAUSAL
