"""Processes that are forked while another thread is inside a block."""

import pytest

from bidirect_patch import disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import ModeConflictError

from ..helpers.one_text import BOTH, moves, output
from ..helpers.threads_and_forks import InBlock, needs_fork, works_in_a_fork
from ..helpers.tiny_models import llama


@needs_fork
def test_a_forked_child_is_told_of_a_causal_block_that_nobody_will_end():
    model = enable_bidirectional(llama())

    def in_child():
        with pytest.raises(ModeConflictError, match="forked"):
            output(model)
        assert moves(enable_bidirectional(model)) == BOTH

    with InBlock(model, False):
        assert works_in_a_fork(in_child)


@needs_fork
def test_a_forked_child_has_no_blocks_of_threads_that_are_not_there():
    model = enable_bidirectional(llama())
    with InBlock(model, True):
        assert works_in_a_fork(lambda: disable_bidirectional(model))
