"""What failed when public bug reports and real scripts were tried on the package; each by its kind, seen by changing a token."""

import asyncio
import copy
import json
import os
import signal
import threading
import warnings

import pytest
import torch
import transformers
from transformers import LlamaModel

from bidirect_patch import (
    LabelLeakWarning,
    apply_mntp_head,
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
    remove_mntp_head,
)
from bidirect_patch.errors import (
    AttentionMaskError,
    GenerateError,
    ModeConflictError,
    OrderError,
    UnsupportedModelError,
)

from .small import BOTH, CAUSAL, IDS, ONES, PADDED, TRANSFORMERS, Version, assert_twins, causal_lm, llama, moves, output

each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])
needs_native = pytest.mark.skipif(TRANSFORMERS < Version("5.2"), reason="before 5.2 no config makes a model bidirectional")


def moves_real(model, **kwargs):
    """Which real positions of a padded row the last real token moves."""
    return moves(model, at=6, attention_mask=PADDED, **kwargs)[:7]


# Wrappers


@pytest.fixture
def prepared():
    """accelerate's `prepare` with bfloat16, which wraps the forward on the instance, and its `unwrap_model`."""
    accelerate = pytest.importorskip("accelerate")

    def prepare(model):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        return accelerator.prepare(model), accelerator

    return prepare


@pytest.mark.parametrize("first", ["patch", "prepare"])
@pytest.mark.parametrize("keep", [True, False])
def test_unwrapping_does_not_undo_the_patch(prepared, first, keep):
    model = llama()
    if first == "patch":
        enable_bidirectional(model)
    wrapped, accelerator = prepared(model)
    enable_bidirectional(wrapped)
    assert moves_real(wrapped) == BOTH[:7] and is_bidirectional(model)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=keep)
    assert moves_real(model) == BOTH[:7] and is_bidirectional(model)
    disable_bidirectional(model)
    assert moves_real(model) == CAUSAL[-7:] and not is_bidirectional(model)
    enable_bidirectional(model)
    assert moves_real(model) == BOTH[:7] and is_bidirectional(model)


def test_a_forward_that_goes_around_the_patch_is_seen():
    model = enable_bidirectional(llama())
    model.forward = LlamaModel.forward.__get__(model)
    model.layers[0].self_attn.forward = type(model.layers[0].self_attn)._original.forward.__get__(model.layers[0].self_attn)
    assert not is_bidirectional(model)


def test_head_after_prepare_and_off_after_it(prepared):
    model = causal_lm()
    wrapped, _ = prepared(model)
    apply_mntp_head(wrapped)
    labels = torch.where(IDS % 2 == 0, IDS, -100)
    hidden = torch.where(IDS % 2 == 0, 3, IDS)
    assert wrapped(input_ids=hidden, labels=labels).loss.isfinite() and moves(model) == BOTH
    remove_mntp_head(model)
    assert model(input_ids=hidden, labels=labels).logits.shape[-1] == 60
    disable_bidirectional(model)
    assert moves(model) == CAUSAL


# Recorded graphs


@each_backend
@pytest.mark.parametrize("window", [None, 12])
def test_a_trace_is_right_for_other_masks_and_lengths(backend, window):
    config = transformers.MistralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = transformers.MistralModel._from_config(config, attn_implementation=backend).eval().requires_grad_(False)
    enable_bidirectional(model)

    def run(ids, mask):
        return model(input_ids=ids, attention_mask=mask, return_dict=False)[0]

    traced = torch.jit.trace(run, (IDS, ONES), check_trace=False)
    ids = torch.arange(3, 33).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    for given in ((IDS, PADDED), (IDS, PADDED.flip(1)), (ids, mask)):
        real = given[1].bool()
        torch.testing.assert_close(traced(*given)[real], run(*given)[real], atol=1e-5, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, backend="eager")], ids=["plain", "compiled"])
def test_a_forward_taken_before_the_patch_is_bidirectional_too(backend, wrap):
    model = llama(backend=backend)
    forward = wrap(model.forward)
    enable_bidirectional(model)
    assert moves(forward) == moves(forward, attention_mask=ONES) == BOTH
    assert moves(forward, at=6, attention_mask=PADDED)[:7] == BOTH[:7]


# Threads, tasks, forks


class InBlock(threading.Thread):
    """A thread that is inside a block until `leave`."""

    def __init__(self, model, enabled):
        super().__init__()
        self.model, self.enabled, self.inside, self.go = model, enabled, threading.Event(), threading.Event()
        self.start()
        assert self.inside.wait(30)

    def run(self):
        with bidirectional(self.model, self.enabled):
            self.inside.set()
            self.go.wait(30)

    def leave(self):
        self.go.set()
        self.join(30)


def test_another_threads_causal_block_is_no_silent_causality():
    model = enable_bidirectional(llama())
    thread = InBlock(model, False)
    try:
        with pytest.raises(ModeConflictError, match="causal block"):
            output(model)
        with pytest.raises(ModeConflictError), bidirectional(model):
            pass
        with bidirectional(model, enabled=False):
            assert moves(model) == CAUSAL
    finally:
        thread.leave()
    assert moves(model) == BOTH and is_bidirectional(model)


def test_a_block_of_a_thread_that_ended_holds_nothing():
    model = enable_bidirectional(llama())
    block = bidirectional(model, enabled=False)
    thread = threading.Thread(target=block.__enter__)
    thread.start()
    thread.join()
    assert moves(enable_bidirectional(model)) == BOTH


def test_blocks_nest_across_an_event_loop():
    model = llama()

    async def inside():
        with bidirectional(model, enabled=False):
            return moves(model)

    with bidirectional(model):
        assert asyncio.run(inside()) == CAUSAL
        assert moves(model) == BOTH
    assert moves(model) == CAUSAL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_no_blocks_of_threads_that_are_not_there():
    model = enable_bidirectional(llama())
    thread = InBlock(model, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, which is the point
        child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            disable_bidirectional(model)
            os._exit(0)
        finally:
            os._exit(1)
    thread.leave()
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_toggle_and_run_get_a_result_or_an_error_of_the_family():
    model, wrong = llama(), []
    causal, both = output(model), output(enable_bidirectional(model))
    disable_bidirectional(model)

    def work():
        for _ in range(30):
            try:
                with bidirectional(model):
                    if not torch.equal(output(model), both):
                        wrong.append("bidirectional block")
            except ModeConflictError:
                pass
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(output(model), causal)


def test_threads_that_save_change_nothing(tmp_path):
    model, twin = causal_lm(), causal_lm()
    twin.load_state_dict(model.state_dict())
    enable_bidirectional(model)
    config = model.config
    threads = [threading.Thread(target=model.save_pretrained, args=(tmp_path / str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.config is config and getattr(config, "is_causal", None) is not False
    for i in range(4):
        assert json.loads((tmp_path / str(i) / "config.json").read_text())["is_causal"] is False
    assert_twins(disable_bidirectional(model), twin)


# Labels


@pytest.mark.parametrize("head", [False, True])
def test_labels_that_leak_are_said_once(head):
    model = (apply_mntp_head if head else enable_bidirectional)(causal_lm())
    with pytest.warns(LabelLeakWarning, match="unhidden"):
        model(input_ids=IDS, labels=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, labels=IDS)
        hidden = (apply_mntp_head if head else enable_bidirectional)(causal_lm())
        hidden(input_ids=torch.full_like(IDS, 3), labels=IDS)
        with bidirectional(enable_bidirectional(causal_lm()), enabled=False) as causal:
            causal(input_ids=IDS, labels=IDS)
        causal_lm()(input_ids=IDS, labels=IDS)


# Masks


def test_a_mask_per_head_is_none_per_window():
    """Two heads and two different windows: the mask's channels are heads all the same."""
    config = transformers.Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    )
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
    config = transformers.Gemma3TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
        **settings,
    )
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


@needs_native
def test_disabling_what_its_config_makes_bidirectional_is_an_error():
    model = llama(is_causal=False)
    assert moves(model) == BOTH and is_bidirectional(model)
    with pytest.raises(OrderError, match="is_causal=True"):
        disable_bidirectional(model)
    with bidirectional(model, enabled=False):
        assert moves(model) == CAUSAL and not is_bidirectional(model)


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
