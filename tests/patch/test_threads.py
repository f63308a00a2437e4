"""Threads that share a model."""

import copy
import json
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.utils.checkpoint
from packaging.version import Version

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import BidirectPatchError, ModeConflictError, OrderError

from ..helpers.seeing import CLOSE, IDS, MASK, hidden, reached, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.versions import TRANSFORMERS


class Thread(threading.Thread):
    """Holds `with bidirectional(model, enabled, ...)` open until told to leave."""

    def __init__(self, model, enabled, **sinks):
        super().__init__(daemon=True)
        self.entered, self.leave, self.error = threading.Event(), threading.Event(), None

        def run():
            try:
                with bidirectional(model, enabled=enabled, **sinks):
                    self.entered.set()
                    self.leave.wait(20)
            except BaseException as error:
                self.error = error
                self.entered.set()

        self.run = run

    def __enter__(self):
        self.start()
        assert self.entered.wait(20) and self.error is None
        return self

    def __exit__(self, *_):
        self.leave.set()
        self.join(20)
        assert not self.is_alive() and self.error is None


@pytest.mark.parametrize("theirs", [True, False], ids=["theirs-on", "theirs-off"])
def test_threads_that_want_opposite_modes_get_an_error(make_model, theirs):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    as_theirs = sees_all if theirs else sees_only_the_past
    with Thread(model, theirs):
        assert as_theirs(model)
        with pytest.raises(ModeConflictError) as caught:
            with bidirectional(model, enabled=not theirs):
                pytest.fail("entered")
        assert isinstance(caught.value, BidirectPatchError)
        with pytest.raises(ModeConflictError):
            (disable_bidirectional if theirs else enable_bidirectional)(model)
        assert as_theirs(model), "the first thread's mode holds"
        with bidirectional(model, enabled=theirs):
            assert as_theirs(model)
        assert as_theirs(model), "leaving must not take the mode from under the first thread"
    assert_same(before, snapshot(model))
    with bidirectional(model, enabled=not theirs):
        assert sees_all(model) != theirs
    assert_same(before, snapshot(model))


def moved_by_last(model):
    """A digit per position: 1 where the last token moves what comes out."""
    return "".join(str(int(moved)) for moved in reached(model)[:, -1])


def test_threads_that_want_other_sinks_get_an_error(make_model):
    model = enable_bidirectional(make_model(), num_sink_tokens=1)
    with Thread(model, True, num_sink_tokens=2, num_sinkless_layers=1):
        assert moved_by_last(model) == "00111111"
        for other in (dict(num_sink_tokens=1), dict(num_sink_tokens=2), {}):
            with pytest.raises(ModeConflictError, match="sink tokens"):
                with bidirectional(model, **other):
                    pytest.fail("entered")
            with pytest.raises(ModeConflictError, match="2 sink tokens and 1 sinkless"):
                enable_bidirectional(model, **other)
        for other in (lambda: disable_bidirectional(model), lambda: bidirectional(model, enabled=False).__enter__()):
            with pytest.raises(ModeConflictError):
                other()
        with bidirectional(model, num_sink_tokens=2, num_sinkless_layers=1):
            assert moved_by_last(model) == "00111111"
        assert moved_by_last(model) == "00111111"
    assert moved_by_last(model) == "01111111"


def test_sinks_set_for_good_outlive_the_blocks_of_others(make_model):
    model = make_model()
    with Thread(model, True, num_sink_tokens=2):
        enable_bidirectional(model, num_sink_tokens=2)
    assert moved_by_last(model) == "00111111"


def test_the_last_thread_to_leave_restores(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    first = Thread(model, True)
    with first:
        second = Thread(model, True)
        second.__enter__()
    assert sees_all(model), "the second thread is still inside"
    second.__exit__()
    assert_same(before, snapshot(model))


def test_threads_in_the_same_mode_get_right_results(make_model):
    model = make_model()
    rows = torch.randint(3, 61, (4, 3, 8), generator=torch.Generator().manual_seed(5))
    mask = MASK[1:].expand(3, -1)
    with (
        torch.no_grad(),
        bidirectional(model),
    ):  # logits: transformers 4.57 to 5.1 record hidden states in no thread-safe way
        expected = [model(ids, attention_mask=mask).logits for ids in rows]
    assert not torch.allclose(model(rows[0], attention_mask=mask).logits[:, 0], expected[0][:, 0])
    before = snapshot(model)
    errors = []
    start = threading.Barrier(len(rows))

    def encode(ids, right):
        try:
            start.wait(20)
            with torch.no_grad():
                for _ in range(10):
                    with bidirectional(model):
                        out = model(ids, attention_mask=mask).logits
                    torch.testing.assert_close(out, right, **CLOSE)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=encode, args=pair, daemon=True) for pair in zip(rows, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
def test_what_is_set_for_good_outlives_the_blocks_of_others(make_model, family, count, enabled):
    """Their blocks found the other mode. Their end must not undo what was asked for meanwhile."""
    model = make_model(family)
    hidden(model)
    before = snapshot(model)
    if not enabled:
        enable_bidirectional(model)
    threads = [Thread(model, enabled).__enter__() for _ in range(count)]
    (enable_bidirectional if enabled else disable_bidirectional)(model)
    for thread in threads:
        thread.__exit__()
        assert not enabled or sees_all(model)  # while another is in a causal block, nobody else may call it
    assert enabled or sees_only_the_past(model)
    assert_same(before, snapshot(disable_bidirectional(model) if enabled else model))


def test_the_last_who_asks_wins_while_others_are_in_a_block(make_model):
    model = enable_bidirectional(make_model())
    with Thread(model, False):
        disable_bidirectional(model)
        with pytest.raises(ModeConflictError):
            enable_bidirectional(model)
    assert sees_only_the_past(model)
    with Thread(model, True):
        enable_bidirectional(model)
        with pytest.raises(ModeConflictError):
            disable_bidirectional(model)
        with bidirectional(model):
            enable_bidirectional(model)  # in a block of one's own, the block brings back what it found
    assert sees_all(model)


@pytest.mark.skipif(TRANSFORMERS < Version("5.2"), reason="before 5.2 no config makes a model bidirectional")
def test_a_model_that_is_bidirectional_by_its_config_is_not_disabled_in_anothers_causal_block(make_model):
    model = make_model(is_causal=False)
    assert sees_all(model)
    with Thread(model, False):
        with pytest.raises(OrderError, match="by its config"):
            disable_bidirectional(model)
    assert sees_all(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_no_copy_of_what_another_has_in_a_causal_block(make_model, copied):
    """The copy would be causal, and nothing would ever bring it back."""
    model = enable_bidirectional(make_model())
    with Thread(model, False):
        with pytest.raises(ModeConflictError, match="was copied while another"):
            copied(model)
        with bidirectional(model, enabled=False):
            copied(model)
    made = copied(model)
    assert sees_all(model)
    assert sees_all(pickle.loads(made) if isinstance(made, bytes) else made)


def test_nothing_is_saved_that_another_has_in_a_causal_block(make_model, tmp_path):
    model = enable_bidirectional(make_model())
    with Thread(model, False):
        with pytest.raises(ModeConflictError, match="was saved while another"):
            model.save_pretrained(tmp_path / "meanwhile")
        assert not (tmp_path / "meanwhile").exists()
    model.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after" / "config.json").read_text())["is_causal"] is False


def test_no_adapter_is_saved_that_another_has_in_a_causal_block(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = enable_bidirectional(peft.get_peft_model(make_model(), settings))
    with Thread(model, False):
        with pytest.raises(ModeConflictError, match="was saved while another"):
            model.save_pretrained(tmp_path / "meanwhile")
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "adapter_config.json").exists()


class Streamer:
    """What `generate` hands its tokens to."""

    def __init__(self):
        self.tokens, self.is_over = 0, threading.Event()

    def put(self, value):
        self.tokens += value.numel()

    def end(self):
        self.is_over.set()


@pytest.mark.parametrize("block", ["in the thread", "around the thread", "none"])
def test_who_reads_a_stream_never_waits_for_ever(make_model, block):
    model, streamer, errors = enable_bidirectional(make_model()), Streamer(), []

    def generate():
        try:
            with bidirectional(model, enabled=False) if block == "in the thread" else nullcontext():
                model.generate(IDS[:1], max_new_tokens=3, do_sample=False, streamer=streamer)
        except BidirectPatchError as error:
            errors.append(type(error).__name__)

    with bidirectional(model, enabled=False) if block == "around the thread" else nullcontext():
        thread = threading.Thread(target=generate)
        thread.start()
        assert streamer.is_over.wait(60)
        thread.join()
    assert errors == {"in the thread": [], "around the thread": ["ModeConflictError"], "none": ["GenerateError"]}[block]
    assert (streamer.tokens == IDS.shape[1] + 3) == (block == "in the thread")
