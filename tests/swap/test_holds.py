"""Which thread or task holds a module in which mode: blocks and forwards of this thread, of others, and of none any more."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
from torch import nn

from bidirect_patch.errors import ModeConflictError
from bidirect_patch.swap import in_use
from bidirect_patch.swap.modes import Mode, Setting

from ..helpers.threads_and_forks import needs_fork, works_in_a_fork

OPEN, CAUSAL = Setting(Mode.BIDIRECTIONAL), Setting(Mode.CAUSAL_BLOCK)


class Block:
    """What a hold belongs to; it can't be a plain object(), which has no weak references."""


@pytest.fixture
def module():
    return nn.Linear(1, 1)


@contextmanager
def other_thread(work, at_end=lambda: None):
    """Runs `work` in a thread that stays until the end of the block, and then runs `at_end`; gives what `work` returned."""
    done, leave, result = threading.Event(), threading.Event(), []

    def run():
        result.append(work())
        done.set()
        leave.wait(20)
        at_end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert done.wait(20)
    try:
        yield result[0]
    finally:
        leave.set()
        thread.join(20)


def conflicts(check, *args):
    """What the error of a call says; None without one."""
    try:
        check(*args)
    except ModeConflictError as error:
        return str(error)
    return None


def in_other_thread(call, *args):
    with other_thread(lambda: call(*args)) as result:
        return result


@pytest.mark.parametrize("mode, other", [(OPEN, CAUSAL), (CAUSAL, OPEN)], ids=["open", "causal"])
def test_another_threads_block_forbids_the_other_mode(module, mode, other):
    block = Block()
    with other_thread(lambda: in_use.hold(module, mode, None, block)):
        assert conflicts(in_use.check, module, mode, mode) is None
        said = conflicts(in_use.check, module, other, mode)
        words = ("bidirectional", "causal") if mode is OPEN else ("causal", "bidirectional")
        assert f"wants Linear {words[1]} while another uses it {words[0]}" in said
    assert conflicts(in_use.check, module, other, mode) is None, "its thread has ended"


@pytest.mark.parametrize("mode, other", [(OPEN, CAUSAL), (CAUSAL, OPEN)], ids=["open", "causal"])
def test_an_own_block_forbids_no_other(module, mode, other):
    block = Block()
    in_use.hold(module, mode, None, block)
    assert conflicts(in_use.check, module, other, mode) is None


def test_who_has_no_causal_block_may_not_call_what_is_in_one(module):
    """The innermost block of the caller decides."""
    blocks = Block(), Block(), Block()
    assert conflicts(in_use.check_caller, module) is None  # nobody has: a copy, for example
    in_use.hold(module, OPEN, None, blocks[0])
    with other_thread(lambda: in_use.hold(module, CAUSAL, None, blocks[1])):
        assert conflicts(in_use.check_caller, module)
        in_use.hold(module, CAUSAL, None, blocks[2])
        assert conflicts(in_use.check_caller, module) is None


def test_the_innermost_block_of_another_thread_counts(module):
    blocks = Block(), Block()

    def hold_both():
        in_use.hold(module, OPEN, None, blocks[0])
        in_use.hold(module, CAUSAL, None, blocks[1])

    with other_thread(hold_both):
        assert conflicts(in_use.check, module, CAUSAL, OPEN) is None
        assert conflicts(in_use.check, module, OPEN, CAUSAL) is not None


def test_each_other_thread_counts(module):
    """Two hold it, in different modes, as no calls of `check` would have let them."""
    blocks = Block(), Block()
    with other_thread(lambda: in_use.hold(module, CAUSAL, None, blocks[0])):
        with other_thread(lambda: in_use.hold(module, OPEN, None, blocks[1])):
            assert conflicts(in_use.check, module, OPEN, OPEN) and conflicts(in_use.check, module, CAUSAL, CAUSAL)


def test_a_forward_of_another_thread_forbids_a_change_alone(module):
    running = in_use.running(module)
    with other_thread(running.__enter__):
        assert conflicts(in_use.check, module, OPEN, OPEN) is None
        assert "another uses it causal" in conflicts(in_use.check, module, OPEN, CAUSAL)
    running.__exit__(None, None, None)
    assert conflicts(in_use.check, module, OPEN, CAUSAL) is None


def test_an_own_forward_forbids_no_change(module):
    with in_use.running(module):
        assert conflicts(in_use.check, module, OPEN, CAUSAL) is None
        assert in_other_thread(conflicts, in_use.check, module, OPEN, CAUSAL)
    assert in_other_thread(conflicts, in_use.check, module, OPEN, CAUSAL) is None


def test_a_forward_that_raised_is_over(module):
    with pytest.raises(KeyError) as kept, in_use.running(module):
        raise KeyError
    assert kept.value.__traceback__, "which keeps the frame of the forward alive"
    assert in_other_thread(conflicts, in_use.check, module, OPEN, CAUSAL) is None


def test_a_caller_without_a_block_is_told_of_another_threads(module):
    assert conflicts(in_use.check_caller, module) is None
    block, mine = Block(), Block()
    with other_thread(lambda: in_use.hold(module, CAUSAL, None, block)):
        assert "Linear was called while another thread" in conflicts(in_use.check_caller, module)
        in_use.hold(module, CAUSAL, None, mine)
        assert conflicts(in_use.check_caller, module) is None


def test_the_last_block_that_is_open_brings_back_what_the_first_one_found(module):
    """In whatever order they end."""
    blocks = [Block() for _ in range(3)]
    first, second, third = (in_use.hold(module, OPEN, found, block) for found, block in zip("abc", blocks))
    assert [in_use.to_restore(module, hold) for hold in (first, second, third)] == [None, None, "c"]
    in_use.release(module, second)
    assert in_use.to_restore(module, third) == "b" and in_use.to_restore(module, first) is None
    in_use.release(module, first)
    assert in_use.to_restore(module, third) == "a"
    in_use.release(module, third)
    assert third.found == "a" and in_use.to_restore(module, third) == "a", "nobody else is left to bring it back"
    in_use.release(module, third)
    assert not in_use.state_of(module).holds


def test_the_end_of_the_last_block_leaves_the_others_as_they_are(module):
    blocks = [Block() for _ in range(2)]
    first, second = (in_use.hold(module, OPEN, found, block) for found, block in zip("ab", blocks))
    in_use.release(module, second)
    assert in_use.state_of(module).holds == [first] and first.found == "a"


def test_a_block_that_is_gone_is_out_of_the_way(module):
    """It can't end by itself any more, so a later one brings back what it found; also behind several that are gone."""
    blocks = [Block() for _ in range(4)]
    first, second, third, fourth = (in_use.hold(module, OPEN, found, block) for found, block in zip("abcd", blocks))
    assert first.is_alive
    blocks[0] = blocks[1] = None
    assert not first.is_alive and not second.is_alive and third.is_alive
    assert in_use.state_of(module).holds == [third, fourth] and (third.found, fourth.found) == ("a", "d")
    assert in_use.to_restore(module, first) is None, "a later block is still open"


def test_a_thread_that_ended_or_is_gone_holds_nothing(module):
    block = Block()
    with other_thread(lambda: in_use.hold(module, CAUSAL, "found", block)) as hold:
        assert hold.is_alive and conflicts(in_use.check_caller, module)
    assert not hold.is_alive
    assert conflicts(in_use.check_caller, module) is None
    assert in_use.to_restore(module, hold) == "found"


def test_no_thread_is_asked_whether_it_runs(module, monkeypatch):
    """A signal within that question marks the main thread as ended, up to Python 3.12."""
    monkeypatch.setattr(threading.Thread, "is_alive", lambda thread: pytest.fail("asked"))
    block = Block()
    assert in_use.hold(module, CAUSAL, None, block).is_alive
    assert len(in_use.state_of(module).holds) == 1


def test_tasks_are_told_apart_and_the_code_around_the_loop_is_theirs(module):
    """Code around an event loop waits until it ends, so that its blocks count as each task's own."""
    around, of_task = Block(), Block()
    in_use.hold(module, CAUSAL, None, around)
    entered, seen = asyncio.Event(), []

    async def holder():
        in_use.hold(module, OPEN, None, of_task)
        entered.set()
        await asyncio.sleep(0.05)

    async def other():
        seen.append(conflicts(in_use.check, module, OPEN, CAUSAL))
        await entered.wait()
        seen.append(conflicts(in_use.check, module, OPEN, OPEN))
        seen.append(conflicts(in_use.check, module, CAUSAL, OPEN))

    async def both():
        await asyncio.gather(other(), holder())

    asyncio.run(both())
    assert seen[:2] == [None, None] and "wants Linear causal" in seen[2]


@needs_fork
def test_a_forked_child_is_alone(module):
    """The blocks and forwards of other threads, and their hold of the lock, are not the child's; its own thread's are."""
    theirs, mine = Block(), Block()
    hold = in_use.hold(module, OPEN, None, mine)
    own, other = in_use.running(module), in_use.running(module)

    def take():
        in_use.hold(module, OPEN, None, theirs)
        other.__enter__()
        in_use.lock.acquire()

    def leave():
        in_use.lock.release()
        other.__exit__(None, None, None)

    def is_alone():
        state = in_use._states[module]
        assert in_use.lock.acquire(timeout=5)
        assert state.holds == [hold] and [forward.thread for forward in state.forwards] == [threading.get_ident()]

    own.__enter__()
    with other_thread(take, leave):
        assert len(in_use._states[module].holds) == 2
        assert works_in_a_fork(is_alone)
        assert len(in_use._states[module].holds) == 2, "the parent keeps all"
    own.__exit__(None, None, None)
