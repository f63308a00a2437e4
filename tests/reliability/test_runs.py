"""Wrappers, recorded graphs, threads, tasks and forks: what failed in real use, each by its kind, seen by changing a token."""

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
    apply_mntp_head,
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
    remove_mntp_head,
)
from bidirect_patch.errors import ArgumentError, ModeConflictError

from .small import (
    BOTH,
    CAUSAL,
    IDS,
    ONES,
    PADDED,
    SIZES,
    assert_twins,
    causal_lm,
    llama,
    moves,
    moves_real,
    output,
)

each_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])
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
    model.layers[0].self_attn.forward = type(model.layers[0].self_attn)._original.forward.__get__(
        model.layers[0].self_attn
    )
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
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it compares shapes, which a trace keeps
def test_a_trace_is_right_for_other_masks_and_lengths(backend, window):
    config = transformers.MistralConfig(**SIZES, sliding_window=window)
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


@pytest.mark.parametrize(
    "backend, compiled",
    [("eager", False), ("sdpa", False), pytest.param("eager", True, marks=pytest.mark.slow), ("sdpa", True)],
)
def test_a_forward_taken_before_the_patch_is_bidirectional_too(backend, compiled):
    model = llama(backend=backend)
    forward = torch.compile(model.forward, backend="eager") if compiled else model.forward
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


def test_what_a_thread_that_ended_has_found_is_brought_back_by_the_last_block():
    """The first thread found the model causal and ended inside its block; the second ends its own block later."""
    model = llama()
    block, inside, go = bidirectional(model), threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: (block.__enter__(), inside.set(), go.wait(30)))
    first.start()
    assert inside.wait(30)
    with bidirectional(model):
        go.set()
        first.join()
        assert moves(model) == BOTH
    assert moves(model) == CAUSAL


@pytest.mark.parametrize("kind", ["coroutine", "generator"])
def test_a_block_is_no_decorator_of_what_runs_later(kind):
    model = llama()

    async def coroutine():
        return moves(model)

    def generator():
        yield moves(model)

    with pytest.raises(ArgumentError, match="inside it"):
        bidirectional(model)({"coroutine": coroutine, "generator": generator}[kind])
    assert bidirectional(model)(lambda: moves(model))() == BOTH and moves(model) == CAUSAL


def test_blocks_nest_across_an_event_loop():
    model = llama()

    async def inside():
        with bidirectional(model, enabled=False):
            return moves(model)

    with bidirectional(model):
        assert asyncio.run(inside()) == CAUSAL
        assert moves(model) == BOTH
    assert moves(model) == CAUSAL


def test_a_sibling_tasks_causal_block_is_no_silent_causality_inside_a_block_around_both():
    model = enable_bidirectional(llama())

    async def holder(entered, seen):
        with bidirectional(model, enabled=False):
            entered.set()
            await seen.wait()
            assert moves(model) == CAUSAL

    async def sibling(entered, seen):
        await entered.wait()
        try:
            for use in (output, copy.deepcopy):
                with pytest.raises(ModeConflictError, match="causal block"):
                    use(model)
        finally:
            seen.set()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(holder(*events), sibling(*events))

    with bidirectional(model):
        asyncio.run(both())
        assert moves(model) == BOTH


def test_no_trace_is_made_in_another_threads_causal_block():
    model = enable_bidirectional(llama()).requires_grad_(False)

    def trace():
        return torch.jit.trace(lambda ids: model(input_ids=ids, return_dict=False)[0], (IDS,), check_trace=False)

    thread = InBlock(model, False)
    try:
        with pytest.raises(ModeConflictError, match="causal block"):
            trace()
    finally:
        thread.leave()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def fork(work):
    """The number of a child that does `work` and ends with 0 if it could."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads, which is the point
        child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@needs_fork
def test_a_forked_child_is_told_of_a_causal_block_that_nobody_will_end():
    model = enable_bidirectional(llama())
    thread = InBlock(model, False)

    def in_child():
        with pytest.raises(ModeConflictError, match="forked"):
            output(model)
        assert moves(enable_bidirectional(model)) == BOTH

    child = fork(in_child)
    thread.leave()
    assert os.waitpid(child, 0)[1] == 0


@needs_fork
def test_a_forked_child_has_no_blocks_of_threads_that_are_not_there():
    model = enable_bidirectional(llama())
    thread = InBlock(model, True)
    child = fork(lambda: disable_bidirectional(model))
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
