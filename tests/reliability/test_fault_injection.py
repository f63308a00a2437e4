"""An error at any step of any change leaves the model wholly in one mode, and the next call goes on from there.

The steps are counted, not listed: a trace function counts the lines of this package that run, and the operation is run again
once for each of them, with an exception raised there. Then real signals, at any instruction.
"""

import linecache
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import bidirect_patch
from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.swap import in_use

from ..helpers.one_text import BOTH, CAUSAL, ONE_SINK, TWO_SINKS, moves
from ..helpers.tiny_models import causal_lm, llama
from ..helpers.twins import assert_twins, leftovers

PACKAGE = str(Path(bidirect_patch.__file__).parent)
pytestmark = pytest.mark.slow
ERRORS = [KeyboardInterrupt, RuntimeError]
STEPS = int(os.environ.get("BIDIRECT_PATCH_STEPS", 30))  # of each operation, drawn at random; all if there are fewer


def is_no_step(frame):
    """Whether Python handles no signal on this line, as a trace function would: one that takes or frees a lock, or a `try:`."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split("#")[0].strip()
    return line in ("try:", "with lock:", "with in_use.lock:")


class Injected:
    """Runs a function and raises an error at its `step`-th line of the package; counts the lines if `step` is None."""

    def __init__(self, step=None, error=RuntimeError):
        self.step, self.error, self.count, self.hit = step, error, 0, False

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not is_no_step(frame):
            self.count += 1
            if self.count == self.step:
                self.hit = True
                raise self.error("injected")
        return self.trace

    def run(self, function):
        """What `function` raised, or None."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            function()
        except (KeyboardInterrupt, RuntimeError) as error:
            return error
        finally:
            sys.settrace(before)
        return None


def enter_and_leave(enabled):
    def operation(model):
        with bidirectional(model, enabled):
            pass

    return operation


def save(model):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)


def forward(model):
    model(input_ids=torch.arange(5, 14)[None])


OPERATIONS = {
    "enable": (False, enable_bidirectional),
    "enable what is on": (True, enable_bidirectional),
    "disable": (True, disable_bidirectional),
    "bidirectional block": (False, enter_and_leave(True)),
    "causal block": (True, enter_and_leave(False)),
    "save": (True, save),
    "forward": (True, forward),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_at_any_step_leaves_one_mode(name, error):
    """Which of the two modes is not said; what is said of it is true, and both verbs work from there."""
    found, operation = OPERATIONS[name]
    model, twin = causal_lm(), causal_lm()
    twin.load_state_dict(model.state_dict())
    enable_bidirectional(model)
    disable_bidirectional(model)  # what is done once per class is done
    counting = Injected()
    (enable_bidirectional if found else disable_bidirectional)(model)
    assert counting.run(lambda: operation(model)) is None
    every = range(1, counting.count + 1)
    steps = every if counting.count <= STEPS else sorted(random.Random(0).sample(every, STEPS))
    hits = 0
    for step in steps:
        (enable_bidirectional if found else disable_bidirectional)(model)
        injected = Injected(step, error)
        injected.run(lambda: operation(model))
        hits += injected.hit
        mode = is_bidirectional(model)
        assert moves(model) == (BOTH if mode else CAUSAL), step
        assert looks_at_labels(model) or not mode, step
        nothing_is_left_under_way(model)
        enable_bidirectional(model)
        assert moves(model) == BOTH and is_bidirectional(model), step
        disable_bidirectional(model)
        assert moves(model) == CAUSAL and not leftovers(model), step
    assert hits >= len(steps) * 0.9, "the errors were raised"
    assert_twins(model, twin)


def enter_and_leave_with_one_sink(model):
    with bidirectional(model, num_sink_tokens=1):
        pass


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "operation, allowed",
    [
        (lambda model: enable_bidirectional(model, num_sink_tokens=1), {ONE_SINK, TWO_SINKS}),
        (enable_bidirectional, {BOTH, TWO_SINKS}),
        (disable_bidirectional, {CAUSAL, TWO_SINKS}),
        (enter_and_leave_with_one_sink, {ONE_SINK, TWO_SINKS}),
    ],
    ids=["other sinks", "no sinks", "disable", "block"],
)
def test_an_error_while_sinks_change_leaves_the_old_or_the_new(operation, allowed, error):
    model, twin = causal_lm(), causal_lm()
    twin.load_state_dict(model.state_dict())

    def found():
        enable_bidirectional(model, num_sink_tokens=2, num_sinkless_layers=1)

    found()
    operation(model)  # what is done once per class is done
    found()
    counting = Injected()
    assert counting.run(lambda: operation(model)) is None
    every = range(1, counting.count + 1)
    steps = every if counting.count <= STEPS else sorted(random.Random(0).sample(every, STEPS))
    seen = set()
    for step in steps:
        found()
        assert moves(model) == TWO_SINKS, step
        Injected(step, error).run(lambda: operation(model))
        moved = moves(model)
        seen.add(moved)
        assert moved in allowed and is_bidirectional(model) == (moved != CAUSAL), step
        assert looks_at_labels(model) or not is_bidirectional(model), step
        nothing_is_left_under_way(model)
    assert TWO_SINKS in seen
    disable_bidirectional(model)
    assert_twins(model, twin)
    assert not leftovers(model)


def looks_at_labels(model):
    """Whether a warning of labels that leak would come."""
    return len(model._forward_pre_hooks) == 1


def nothing_is_left_under_way(model):
    """No block or forward of this thread is left that would keep another thread out or have a causal mask taken for ours."""
    state = in_use.state_of(model.model if hasattr(model, "model") else model)
    assert not state.holds and not list(state.forwards)
    assert not in_use.mask_is_ours() and not in_use._recorded.entered
    free = []
    thread = threading.Thread(target=lambda: free.append(in_use.lock.acquire(timeout=10) and not in_use.lock.release()))
    thread.start()
    thread.join()
    assert free == [True]


def test_real_signals_break_no_model():
    """SIGINT at any instruction of a loop over the functions and blocks."""
    model, twin = llama(num_hidden_layers=8), llama(num_hidden_layers=8)
    twin.load_state_dict(model.state_dict())
    enable_bidirectional(model)
    disable_bidirectional(model)
    wanted, caught, armed, stop = 200, 0, [False], threading.Event()

    def interrupt(*_):
        if armed[0]:  # else it would hit the test and not the package
            armed[0] = False
            raise KeyboardInterrupt

    def send():
        while not stop.is_set():
            time.sleep(random.random() * 0.01)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        while caught < wanted:
            try:
                armed[0] = True
                while armed[0]:  # Python ignores an error in a finalizer: then the next signal is waited for
                    enable_bidirectional(model)
                    with bidirectional(model, enabled=False):
                        pass
                    disable_bidirectional(model)
                    with bidirectional(model):
                        pass
            except KeyboardInterrupt:
                caught += 1
            assert moves(model) == (BOTH if is_bidirectional(model) else CAUSAL)
    finally:
        stop.set()
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert threading.main_thread().is_alive()  # which a signal within Thread.is_alive denies, and all blocks with it
    enable_bidirectional(model)
    assert moves(model) == BOTH
    disable_bidirectional(model)
    assert_twins(model, twin)
    assert not leftovers(model)
    nothing_is_left_under_way(model)
