"""Real attention kernels, each against the decoder in plain torch; and that these checks can fail."""

import pytest
import torch
from packaging.version import Version

import bidirect_patch
from benchmarks.gpu import kernels

from ..helpers.versions import TRANSFORMERS

CPU = torch.device("cpu")
dry = pytest.mark.skipif(
    TRANSFORMERS < Version("5.17"), reason="the checks of kernels are for the transformers of the GPU's machine, 5.17"
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", kernels.CASES, ids=str)
def test_a_kernel_is_the_plain_decoder(case):
    if why := kernels.missing(kernels.KERNELS[case.kernel], dry=False):
        pytest.skip(f"{case.kernel}: {why}")
    outcome = kernels.check(case, torch.device("cuda"))
    assert outcome.fits, outcome
    assert outcome.causal > 10 * outcome.kernel.hidden


def test_every_kernel_has_cases_of_its_own():
    assert {case.kernel for case in kernels.CASES} == set(kernels.KERNELS)
    assert len({str(case) for case in kernels.CASES}) == len(kernels.CASES)


@dry
@pytest.mark.parametrize("name", ["SDPA efficient", "FlashAttention 2"])
def test_a_causal_model_is_not_taken_for_a_bidirectional_one(monkeypatch, name):
    case = kernels.Case(name, "bf16", "padded left", window=False)
    assert kernels.check(case, CPU, dry=True).fits
    monkeypatch.setattr(bidirect_patch, "enable_bidirectional", lambda model: model)
    outcome = kernels.check(case, CPU, dry=True)
    assert not outcome.fits
    assert outcome.kernel.hidden == pytest.approx(outcome.causal, rel=0.1)


@dry
@pytest.mark.parametrize("wrong", ["window", "padding", "packing"])
def test_a_mask_that_is_slightly_off_is_seen(monkeypatch, wrong):
    """The kernel gets another window, or a batch whose padding or packing it isn't told of."""
    window = wrong == "window"
    case = kernels.Case("SDPA efficient", "fp16", {"padding": "padded left"}.get(wrong, "packed"), window)
    assert kernels.check(case, CPU, dry=True).fits  # what it is compared with is kept
    if window:
        wider = kernels.make_model(True, True)
        monkeypatch.setattr(wider.config, "sliding_window", 5)
        for layer in wider.layers:
            monkeypatch.setattr(layer.self_attn, "sliding_window", 5, raising=False)
    else:
        monkeypatch.setattr(kernels.Batch, "inputs", lambda batch, device: {"input_ids": batch.ids})
    assert not kernels.check(case, CPU, dry=True).fits
