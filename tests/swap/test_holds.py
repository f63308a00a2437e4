"""Which thread or task holds a module in which mode: blocks and forwards of this thread, of others, and of none any more."""

import asyncio
import os
import threading
from contextlib import contextmanager

import pytest
from torch import nn

from bidirect_patch.errors import ModeConflictError
from bidirect_patch.swap import modes


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


@pytest.mark.parametrize("mode", [True, False])
def test_another_threads_block_forbids_the_other_mode(module, mode):
    block = Block()
    with other_thread(lambda: modes.hold(module, mode, None, block)):
        assert conflicts(modes.check, module, mode, mode) is None
        said = conflicts(modes.check, module, not mode, mode)
        words = ("bidirectional", "causal") if mode else ("causal", "bidirectional")
        assert f"wants Linear {words[1]} while another uses it {words[0]}" in said
    assert conflicts(modes.check, module, not mode, mode) is None, "its thread has ended"


@pytest.mark.parametrize("mode", [True, False])
def test_an_own_block_forbids_no_other(module, mode):
    block = Block()
    modes.hold(module, mode, None, block)
    assert conflicts(modes.check, module, not mode, mode) is None


def test_who_has_no_causal_block_may_not_call_what_is_in_one(module):
    """The innermost block of the caller decides."""
    blocks = Block(), Block(), Block()
    assert conflicts(modes.check_caller, module) is None  # nobody has: a copy, for example
    modes.hold(module, True, None, blocks[0])
    with other_thread(lambda: modes.hold(module, False, None, blocks[1])):
        assert conflicts(modes.check_caller, module)
        modes.hold(module, False, None, blocks[2])
        assert conflicts(modes.check_caller, module) is None


def test_the_innermost_block_of_another_thread_counts(module):
    blocks = Block(), Block()

    def hold_both():
        modes.hold(module, True, None, blocks[0])
        modes.hold(module, False, None, blocks[1])

    with other_thread(hold_both):
        assert conflicts(modes.check, module, False, True) is None
        assert conflicts(modes.check, module, True, False) is not None


def test_each_other_thread_counts(module):
    """Two hold it, in different modes, as no calls of `check` would have let them."""
    blocks = Block(), Block()
    with other_thread(lambda: modes.hold(module, False, None, blocks[0])):
        with other_thread(lambda: modes.hold(module, True, None, blocks[1])):
            assert conflicts(modes.check, module, True, True) and conflicts(modes.check, module, False, False)


def test_a_forward_of_another_thread_forbids_a_change_alone(module):
    running = modes.running(module)
    with other_thread(running.__enter__):
        assert conflicts(modes.check, module, True, True) is None
        assert "another uses it causal" in conflicts(modes.check, module, True, False)
    running.__exit__(None, None, None)
    assert conflicts(modes.check, module, True, False) is None


def test_an_own_forward_forbids_no_change(module):
    with modes.running(module):
        assert conflicts(modes.check, module, True, False) is None
        assert in_other_thread(conflicts, modes.check, module, True, False)
    assert in_other_thread(conflicts, modes.check, module, True, False) is None


def test_a_forward_that_raised_is_over(module):
    with pytest.raises(KeyError) as kept, modes.running(module):
        raise KeyError
    assert kept.value.__traceback__, "which keeps the frame of the forward alive"
    assert in_other_thread(conflicts, modes.check, module, True, False) is None


def test_a_caller_without_a_block_is_told_of_another_threads(module):
    assert conflicts(modes.check_caller, module) is None
    block, mine = Block(), Block()
    with other_thread(lambda: modes.hold(module, False, None, block)):
        assert "Linear was called while another thread" in conflicts(modes.check_caller, module)
        modes.hold(module, False, None, mine)
        assert conflicts(modes.check_caller, module) is None


def test_the_last_block_that_is_open_brings_back_what_the_first_one_found(module):
    """In whatever order they end."""
    blocks = [Block() for _ in range(3)]
    first, second, third = (modes.hold(module, True, found, block) for found, block in zip("abc", blocks))
    assert [modes.to_restore(module, hold) for hold in (first, second, third)] == [None, None, "c"]
    modes.release(module, second)
    assert modes.to_restore(module, third) == "b" and modes.to_restore(module, first) is None
    modes.release(module, first)
    assert modes.to_restore(module, third) == "a"
    modes.release(module, third)
    assert third.found == "a" and modes.to_restore(module, third) == "a", "nobody else is left to bring it back"
    modes.release(module, third)
    assert not modes.state_of(module).holds


def test_the_end_of_the_last_block_leaves_the_others_as_they_are(module):
    blocks = [Block() for _ in range(2)]
    first, second = (modes.hold(module, True, found, block) for found, block in zip("ab", blocks))
    modes.release(module, second)
    assert modes.state_of(module).holds == [first] and first.found == "a"


def test_a_block_that_is_gone_is_out_of_the_way(module):
    """It can't end by itself any more, so a later one brings back what it found; also behind several that are gone."""
    blocks = [Block() for _ in range(4)]
    first, second, third, fourth = (modes.hold(module, True, found, block) for found, block in zip("abcd", blocks))
    assert first.is_alive
    blocks[0] = blocks[1] = None
    assert not first.is_alive and not second.is_alive and third.is_alive
    assert modes.state_of(module).holds == [third, fourth] and (third.found, fourth.found) == ("a", "d")
    assert modes.to_restore(module, first) is None, "a later block is still open"


def test_a_thread_that_ended_or_is_gone_holds_nothing(module):
    block = Block()
    with other_thread(lambda: modes.hold(module, False, "found", block)) as hold:
        assert hold.is_alive and conflicts(modes.check_caller, module)
    assert not hold.is_alive
    assert conflicts(modes.check_caller, module) is None
    assert modes.to_restore(module, hold) == "found"


def test_no_thread_is_asked_whether_it_runs(module, monkeypatch):
    """A signal within that question marks the main thread as ended, up to Python 3.12."""
    monkeypatch.setattr(threading.Thread, "is_alive", lambda thread: pytest.fail("asked"))
    block = Block()
    assert modes.hold(module, False, None, block).is_alive
    assert len(modes.state_of(module).holds) == 1


def test_tasks_are_told_apart_and_the_code_around_the_loop_is_theirs(module):
    """Code around an event loop waits until it ends, so that its blocks count as each task's own."""
    around, of_task = Block(), Block()
    modes.hold(module, False, None, around)
    entered, seen = asyncio.Event(), []

    async def holder():
        modes.hold(module, True, None, of_task)
        entered.set()
        await asyncio.sleep(0.05)

    async def other():
        seen.append(conflicts(modes.check, module, True, False))
        await entered.wait()
        seen.append(conflicts(modes.check, module, True, True))
        seen.append(conflicts(modes.check, module, False, True))

    async def both():
        await asyncio.gather(other(), holder())

    asyncio.run(both())
    assert seen[:2] == [None, None] and "wants Linear causal" in seen[2]


def in_a_fork(check):
    """Whether `check` holds in a forked child."""
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = check()
        finally:
            os._exit(not right)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_alone(module):
    """The blocks and forwards of other threads, and their hold of the lock, are not the child's; its own thread's are."""
    theirs, mine = Block(), Block()
    hold = modes.hold(module, True, None, mine)
    own, other = modes.running(module), modes.running(module)

    def take():
        modes.hold(module, True, None, theirs)
        other.__enter__()
        modes.lock.acquire()

    def leave():
        modes.lock.release()
        other.__exit__(None, None, None)

    def is_alone():
        state = modes._states[module]
        free = modes.lock.acquire(timeout=5)
        return free and state.holds == [hold] and list(state.running.values()) == [threading.get_ident()]

    own.__enter__()
    with other_thread(take, leave):
        assert len(modes._states[module].holds) == 2
        assert in_a_fork(is_alone)
        assert len(modes._states[module].holds) == 2, "the parent keeps all"
    own.__exit__(None, None, None)
