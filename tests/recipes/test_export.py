"""The recipes of bidirect_patch/checkpoints/README.md that write an encoder to a file: torch.export, ONNX, TorchScript.

The files run without this package.
"""

import pytest
import torch

from bidirect_patch import enable_bidirectional

from ..helpers.tiny_models import tiny_model


class Encoder(torch.nn.Module):
    """Token ids and their mask, (batch, length) -> mean embeddings, (batch, width)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def exported(encoder, example, path):
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(encoder, example, dynamic_shapes=(shape, shape))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def to_onnx(encoder, example, path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} isn't installed")
    import onnxruntime

    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(encoder, example, path, dynamo=True, dynamic_shapes=(shape, shape), input_names=names, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *given: torch.from_numpy(session.run(None, {n: value.numpy() for n, value in zip(names, given)})[0])


def traced(encoder, example, path):
    torch.jit.trace(encoder, example, check_trace=False).save(path)
    return torch.jit.load(path)


def batches():
    """Other sizes than the example's, without padding and padded on either side."""
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((1, 1), (1, 6), (3, 19), (2, 40)):
        ids = torch.randint(3, 60, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        yield ids, mask
        if batch > 1:
            mask = mask.clone()
            mask[0, length // 2 :] = 0
            mask[1, -1] = 0
            yield ids, mask
            yield ids, mask.flip(1)


@pytest.mark.parametrize("window", [None, 8], ids=["full", "window"])
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(exported, id="torch.export", marks=pytest.mark.slow),
        pytest.param(to_onnx, id="onnx", marks=pytest.mark.slow),
        pytest.param(traced, id="jit.trace"),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it compares shapes, which a trace keeps
def test_what_was_exported_gives_what_the_encoder_gives(tmp_path, write, window):
    model = tiny_model("mistral", head=False, sliding_window=window).requires_grad_(False)
    example = torch.randint(3, 60, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    causal = Encoder(model)(*example)
    encoder = Encoder(enable_bidirectional(model)).eval()
    run = write(encoder, example, str(tmp_path / "encoder.pt2"))
    assert (run(*example) - causal).abs().max() > 0.1
    for given in batches():
        torch.testing.assert_close(run(*given), encoder(*given), atol=1e-4, rtol=1e-4)
