"""GritLM's step: a causal block's loss and a bidirectional one, with one `backward()`.

The oracle is a stock twin under explicit masks.
"""

import pytest
import torch
import torch.distributed as dist

from ..helpers.gradients import assert_gradients
from ..helpers.processes import in_two_ranks
from ..helpers.two_losses import BATCH, KINDS, WAYS, expected, half, step


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpoints, sinks", KINDS)
def test_each_loss_has_the_gradients_of_its_own_attention(checkpoints, sinks, way):
    assert_gradients(step(checkpoints, sinks, BATCH, way=way), expected(sinks, BATCH))


@pytest.mark.parametrize("wrong", [{"generative": "bidirectional"}, {"embedding": "causal"}], ids=str)
def test_one_loss_in_the_other_direction_would_be_seen(wrong):
    with pytest.raises(AssertionError):
        assert_gradients(expected((0, 0), BATCH, **wrong), expected((0, 0), BATCH))


@pytest.mark.slow
def test_two_ranks_of_ddp_have_the_mean_of_their_gradients(tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    in_two_ranks("-m", "tests.helpers.two_losses", tmp_path)
    found = iter(torch.load(tmp_path / "found"))
    for _ in WAYS:
        for _, sinks in KINDS:
            one, other = (expected(sinks, half(rank)) for rank in (0, 1))
            assert_gradients(next(found), {name: (one[name] + other[name]) / 2 for name in one})
