"""Blocks that don't nest (tasks, generators) and islands in models that are bidirectional by their config."""

import asyncio
import copy

import pytest
import torch
from packaging.version import Version
from transformers import LlamaForCausalLM

from bidirect_patch import bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ModeConflictError

from ..helpers.one_text import BOTH, CAUSAL, moves, output
from ..helpers.seeing import IDS, sees_all, sees_only_the_past
from ..helpers.tiny_models import llama
from ..helpers.versions import TRANSFORMERS


def test_tasks_in_one_mode_share_a_model(make_model):
    """The first to enter is the first to leave; the second still encodes both ways, and then all is as it was."""
    model, seen = make_model(), []

    async def job(seconds):
        with bidirectional(model):
            await asyncio.sleep(seconds)
            seen.append(sees_all(model))

    async def both():
        await asyncio.gather(job(0.01), job(0.05))

    asyncio.run(both())
    assert seen == [True, True]
    assert not is_bidirectional(model) and sees_only_the_past(model)


def test_tasks_in_opposite_modes_get_an_error(make_model):
    model = make_model()

    async def job(enabled):
        with bidirectional(model, enabled):
            await asyncio.sleep(0.02)
            assert sees_all(model) == enabled

    async def both():
        return await asyncio.gather(job(True), job(False), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None and isinstance(second, ModeConflictError)
    assert sees_only_the_past(model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_generators_may_end_in_any_order(make_model, order):
    model = make_model()

    def encoder():
        with bidirectional(model):
            while True:
                yield sees_all(model)

    encoders = [encoder(), encoder()]
    assert all(map(next, encoders))
    encoders[order[0]].close()
    assert next(encoders[order[1]])
    encoders[order[1]].close()
    assert not is_bidirectional(model) and sees_only_the_past(model)


@pytest.mark.skipif(TRANSFORMERS < Version("5.2"), reason="before 5.2 no config makes a model bidirectional")
@pytest.mark.parametrize("enabled_before", [False, True])
def test_an_island_is_causal_in_a_model_whose_config_says_it_is_not(make_model, tmp_path, enabled_before):
    causal = make_model()
    prompt = {"input_ids": IDS[:1], "max_new_tokens": 6, "do_sample": False}
    text = causal.generate(**prompt)
    with bidirectional(causal):
        causal.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    config = model.config
    if enabled_before:
        enable_bidirectional(model)
    assert sees_all(model) and is_bidirectional(model)
    with bidirectional(model, enabled=False):
        assert sees_only_the_past(model) and not is_bidirectional(model)
        assert torch.equal(model.generate(**prompt), text)
        with bidirectional(model):
            assert sees_all(model) and is_bidirectional(model)
        assert sees_only_the_past(model)
    assert sees_all(model) and is_bidirectional(model)
    assert model.config is config is model.model.config and config.is_causal is False


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
