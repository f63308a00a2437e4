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

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import BidirectPatchError, ModeConflictError, OrderError

from ..helpers.one_text import BOTH, CAUSAL, ONE_SINK, TWO_SINKS, moves, output
from ..helpers.seeing import CLOSE, IDS, MASK, hidden, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.threads_and_forks import InBlock
from ..helpers.tiny_models import causal_lm, llama
from ..helpers.twins import assert_twins
from ..helpers.versions import TRANSFORMERS


@pytest.mark.parametrize("theirs", [True, False], ids=["theirs-on", "theirs-off"])
def test_threads_that_want_opposite_modes_get_an_error(make_model, theirs):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    as_theirs = sees_all if theirs else sees_only_the_past
    with InBlock(model, theirs):
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


def test_threads_that_want_other_sinks_get_an_error(make_model):
    model = enable_bidirectional(make_model(), num_sink_tokens=1)
    with InBlock(model, True, num_sink_tokens=2, num_sinkless_layers=1):
        assert moves(model) == TWO_SINKS
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
            assert moves(model) == TWO_SINKS
        assert moves(model) == TWO_SINKS
    assert moves(model) == ONE_SINK


def test_sinks_set_for_good_outlive_the_blocks_of_others(make_model):
    model = make_model()
    with InBlock(model, True, num_sink_tokens=2):
        enable_bidirectional(model, num_sink_tokens=2)
    assert moves(model) == TWO_SINKS


def test_the_last_thread_to_leave_restores(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    first = InBlock(model, True)
    with first:
        second = InBlock(model, True)
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
    threads = [InBlock(model, enabled).__enter__() for _ in range(count)]
    (enable_bidirectional if enabled else disable_bidirectional)(model)
    for thread in threads:
        thread.__exit__()
        assert not enabled or sees_all(model)  # while another is in a causal block, nobody else may call it
    assert enabled or sees_only_the_past(model)
    assert_same(before, snapshot(disable_bidirectional(model) if enabled else model))


def test_the_last_who_asks_wins_while_others_are_in_a_block(make_model):
    model = enable_bidirectional(make_model())
    with InBlock(model, False):
        disable_bidirectional(model)
        with pytest.raises(ModeConflictError):
            enable_bidirectional(model)
    assert sees_only_the_past(model)
    with InBlock(model, True):
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
    with InBlock(model, False):
        with pytest.raises(OrderError, match="by its config"):
            disable_bidirectional(model)
    assert sees_all(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_no_copy_of_what_another_has_in_a_causal_block(make_model, copied):
    """The copy would be causal, and nothing would ever bring it back."""
    model = enable_bidirectional(make_model())
    with InBlock(model, False):
        with pytest.raises(ModeConflictError, match="was copied while another"):
            copied(model)
        with bidirectional(model, enabled=False):
            copied(model)
    made = copied(model)
    assert sees_all(model)
    assert sees_all(pickle.loads(made) if isinstance(made, bytes) else made)


def test_nothing_is_saved_that_another_has_in_a_causal_block(make_model, tmp_path):
    model = enable_bidirectional(make_model())
    with InBlock(model, False):
        with pytest.raises(ModeConflictError, match="was saved while another"):
            model.save_pretrained(tmp_path / "meanwhile")
        assert not (tmp_path / "meanwhile").exists()
    model.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after" / "config.json").read_text())["is_causal"] is False


def test_no_adapter_is_saved_that_another_has_in_a_causal_block(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = enable_bidirectional(peft.get_peft_model(make_model(), settings))
    with InBlock(model, False):
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


def test_another_threads_causal_block_is_no_silent_causality():
    model = enable_bidirectional(llama())
    with InBlock(model, False):
        with pytest.raises(ModeConflictError, match="causal block"):
            output(model)
        with pytest.raises(ModeConflictError), bidirectional(model):
            pass
        with bidirectional(model, enabled=False):
            assert moves(model) == CAUSAL
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
