"""Real attention kernels, each against the decoder in plain torch; and that these checks can fail."""

import pytest
import torch
from packaging.version import Version

import bidirect_patch
from benchmarks.gpu import kernels

from ..helpers.references.plain_decoder import reach
from ..helpers.tiny_models import tiny_model
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


IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(6))
PADDED = (torch.arange(10) < torch.tensor([[10], [6]])).long()
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]])
READY = torch.zeros(2, 1, 10, 10).masked_fill(~reach(PADDED.bool(), window=3)[:, None], torch.finfo(torch.float32).min)


@pytest.mark.skipif(TRANSFORMERS < Version("5.0"), reason="transformers' own forward looks at masks there")
@pytest.mark.parametrize(
    "inputs",
    [
        dict(attention_mask=PADDED),
        dict(position_ids=PACKED),
        dict(attention_mask=PADDED, position_ids=PACKED),
        dict(attention_mask=READY),
    ],
    ids=["padded", "packed", "packed and padded", "ready"],
)
def test_nothing_is_read_back_while_a_cuda_graph_is_captured(monkeypatch, inputs):
    """A capture can't wait for the GPU, and the graph runs on other values later."""
    model = bidirect_patch.enable_bidirectional(tiny_model("mistral", "sdpa", sliding_window=3))

    def read(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    with torch.no_grad():
        expected = model.model(IDS, **inputs).last_hidden_state
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            for way in ("tolist", "item", "__bool__", "__int__", "__float__"):
                patch.setattr(torch.Tensor, way, read)
            found = model.model(IDS, **inputs).last_hidden_state
    real = PADDED.bool() if "attention_mask" in inputs else slice(None)
    torch.testing.assert_close(found[real], expected[real])
