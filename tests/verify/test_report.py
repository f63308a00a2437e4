"""The report against layers whose dependencies are known by construction."""

import re

import pytest
import torch
from torch import nn

from bidirect_patch.errors import BidirectPatchError, ConfigError, StillCausalError, UnsupportedModelError
from bidirect_patch.verify.report import assert_bidirectional, attention_report

from ..helpers.toy_layers import FULL, LENGTH, Layer, Mix, Toy, band, toy


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("carry", [None, "keyword"])
def test_any_pattern_is_recovered(seed, carry):
    pattern = (torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.4).float()
    (layer,) = attention_report(toy(pattern, carry=carry)).layers
    assert torch.equal(layer.matrix, (pattern + torch.eye(LENGTH)) > 0)


@pytest.mark.parametrize(
    "pattern, verdict, backward, forward",
    [
        (FULL, "bidirectional", 6, 6),
        (band(3, 3), "bidirectional", 3, 3),
        (torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)), "bidirectional", 3, 3),
        (band(6, 0), "causal", 6, 0),
        (band(2, 0), "causal", 2, 0),
        (band(1, 0) * 0 + torch.eye(LENGTH), "no attention", 0, 0),
        (band(3, 1), "partial", 3, 1),
        (band(0, 6), "partial", 0, 6),
    ],
)
def test_verdict_and_reach(pattern, verdict, backward, forward):
    report = attention_report(toy(pattern, shape="tuple"))
    (layer,) = report.layers
    assert (layer.verdict, layer.backward, layer.forward) == (verdict, backward, forward)
    assert report.is_bidirectional == (verdict == "bidirectional")


def test_each_layer_is_judged_alone():
    report = attention_report(toy(FULL, band(6, 0), FULL))
    assert [layer.verdict for layer in report.layers] == ["bidirectional", "causal", "bidirectional"]
    assert [layer.name for layer in report.layers] == ["stack.0", "stack.1", "stack.2"]
    assert not report.is_bidirectional


def test_layers_without_attention_beside_bidirectional_ones():
    assert attention_report(toy(FULL, torch.eye(LENGTH))).is_bidirectional
    assert not attention_report(toy(torch.eye(LENGTH))).is_bidirectional


@pytest.mark.parametrize("small", [1e-6, 1e-9])
def test_a_dependency_too_small_to_move_the_output_is_seen_by_its_gradient(small):
    pattern = band(6, 0)
    pattern[0, 6] = small
    (layer,) = attention_report(toy(pattern)).layers
    assert layer.verdict == "partial" and layer.forward == 6


class WithoutGradient(Layer):
    def forward(self, *args):
        with torch.no_grad():
            return super().forward(*args)


class Refusing(Layer):
    def forward(self, states, *args):
        if states.requires_grad:
            raise NotImplementedError("no backward here")
        return super().forward(states, *args)


@pytest.mark.parametrize("cls", [WithoutGradient, Refusing])
@pytest.mark.parametrize("pattern", [FULL, band(6, 0), band(2, 2)])
def test_layers_without_a_gradient_are_seen_by_perturbation(cls, pattern):
    (layer,) = attention_report(Toy(cls(pattern)).eval()).layers
    assert torch.equal(layer.matrix, pattern > 0)


class Noisy(Layer):
    """As parallel reductions do, differs a little from row to row and run to run."""

    def forward(self, states, *args):
        with torch.no_grad():
            return super().forward(states, *args) * (1 + 1e-6 * torch.rand(states.shape))


def test_numeric_noise_is_no_dependency():
    (layer,) = attention_report(Toy(Noisy(band(6, 0))).eval()).layers
    assert torch.equal(layer.matrix, band(6, 0) > 0)
    assert layer.padding_ok and layer.packing_ok


class Transposed(Toy):
    def call(self, layer, states, mask, documents):
        return layer(states.transpose(0, 1), mask, documents).transpose(0, 1)


class PositionsFirst(Layer):
    def forward(self, states, mask=None, documents=1):
        return super().forward(states.transpose(0, 1), mask, documents).transpose(0, 1)


class Stacked(Toy):
    """Four streams before the rows, as Gemma 3n has."""

    def call(self, layer, states, mask, documents):
        return layer(states.expand(4, *states.shape).clone(), mask, documents).mean(0)


class FourStreams(Layer):
    def forward(self, states, mask=None, documents=1):
        return torch.stack([super(FourStreams, self).forward(s, mask, documents) for s in states])


class Split(Toy):
    """Streams after the positions, as hyper-connections have."""

    def call(self, layer, states, mask, documents):
        return layer(states.unflatten(-1, (2, 4)), mask, documents).flatten(-2)


class TwoStreams(Layer):
    def forward(self, states, mask=None, documents=1):
        return super().forward(states.flatten(-2), mask, documents).unflatten(-1, (2, 4))


class Flattened(Toy):
    """One axis for rows and positions, as models without padding have."""

    def call(self, layer, states, mask, documents):
        return layer(states.flatten(0, 1), mask, documents).reshape(states.shape)


@pytest.mark.parametrize(
    "model, layer",
    [(Transposed, PositionsFirst), (Stacked, FourStreams), (Split, TwoStreams), (Flattened, Layer)],
)
@pytest.mark.parametrize("pattern", [band(6, 0), band(2, 2)])
def test_hidden_states_of_other_shapes(model, layer, pattern):
    (seen,) = attention_report(model(layer(pattern)).eval()).layers
    assert torch.equal(seen.matrix, pattern > 0)
    assert seen.padding_ok and seen.packing_ok


class SideBranch(Layer):
    """Attention and, beside it, a causal convolution: the sum depends on everything, half of it only looks back."""

    def __init__(self, weights):
        super().__init__(weights)
        self.conv = Mix(band(2, 0))

    def forward(self, states, mask=None, documents=1):
        return states + self.mix(states, mask, documents) + self.conv(states, mask, documents)


def test_a_causal_part_beside_attention_is_named():
    report = attention_report(Toy(SideBranch(FULL)).eval())
    (layer,) = report.layers
    assert layer.matrix.all() and layer.verdict == "partial" and layer.causal_parts == ("conv",)
    assert not report.is_bidirectional and "only looks back: conv" in str(report)


class InPlace(SideBranch):
    """What looks both ways is added to what only looks back, in its own memory."""

    def forward(self, states, mask=None, documents=1):
        back = self.conv(states, mask, documents)
        back += self.mix(states, mask, documents)
        return states + back


def test_a_causal_part_whose_output_is_changed_in_place_is_named():
    (layer,) = attention_report(Toy(InPlace(FULL)).eval()).layers
    assert layer.verdict == "partial" and layer.causal_parts == ("conv",)


class Sharp(Layer):
    """Attention whose weights but the first are too small to move the output, and beside it the plain states."""

    def __init__(self, small):
        super().__init__(FULL.clone())
        self.mix.weights[:, 1:] = small
        self.plain = Mix(FULL)

    def forward(self, states, mask=None, documents=1):
        return states + self.mix(states, mask, documents) + self.plain(states, mask, documents)


def test_a_part_with_very_small_weights_does_not_look_causal():
    (layer,) = attention_report(Toy(Sharp(1e-8)).eval()).layers
    assert layer.verdict == "bidirectional" and layer.causal_parts == ()
    (layer,) = attention_report(Toy(Sharp(0)).eval()).layers
    assert layer.verdict == "partial" and layer.causal_parts == ("mix",)


class SharedValues(nn.Module):
    """Mixes what an earlier layer saw, as layers that share keys and values do; its own input goes straight through."""

    def __init__(self, earlier, weights):
        super().__init__()
        self.earlier, self.mix = [earlier], Mix(weights)

    def forward(self, states, mask=None, documents=1):
        return states + self.mix(self.earlier[0].seen, mask, documents)


class Remembering(Layer):
    def forward(self, states, mask=None, documents=1):
        self.seen = states
        return super().forward(states, mask, documents)


@pytest.mark.parametrize("pattern", [band(6, 0), FULL])
def test_a_layer_that_reads_the_values_of_an_earlier_one(pattern):
    first = Remembering(pattern)
    report = attention_report(Toy(first, SharedValues(first, pattern)).eval())
    assert torch.equal(report.layers[1].matrix, pattern > 0)


def test_padding_within_reach():
    report = attention_report(toy(FULL, sees_padding=True))
    assert report.layers[0].verdict == "bidirectional" and report.layers[0].padding_ok is False
    assert not report.is_bidirectional and "padding reached in 1 layers" in report.summary


def test_documents_within_reach():
    report = attention_report(toy(FULL, mixes_documents=True))
    assert report.layers[0].verdict == "bidirectional" and report.layers[0].packing_ok is False
    assert not report.is_bidirectional and "documents mixed in 1 layers" in report.summary


class NaNPadding(Layer):
    def forward(self, states, mask=None, documents=1):
        new = super().forward(states, mask, documents)
        return new if mask is None else new.masked_fill(mask[..., None] == 0, float("nan"))


def test_padding_has_to_be_finite():
    assert attention_report(Toy(NaNPadding(FULL)).eval()).layers[0].padding_ok is False


class CausalUnderAMask(Layer):
    def forward(self, states, mask=None, documents=1):
        self.mix.weights = FULL if mask is None else band(6, 0)
        return super().forward(states, mask, documents)


def test_causal_only_when_a_mask_is_given():
    report = attention_report(Toy(CausalUnderAMask(FULL)).eval())
    (layer,) = report.layers
    assert layer.verdict == "partial" and not report.is_bidirectional
    assert layer.verdicts["no mask"] == "bidirectional" and layer.verdicts["padded left"] == "causal"
    assert "mask of ones: causal" in str(report)


class PlainForward(Toy):
    def forward(self, input_ids):
        return super().forward(input_ids)


def test_what_the_model_does_not_take_is_not_claimed():
    (layer,) = attention_report(PlainForward(Layer(FULL)).eval()).layers
    assert layer.padding_ok is None and layer.packing_ok is None and list(layer.verdicts) == ["no mask"]


def test_an_uneven_window_is_told_from_the_mirror_image():
    causal = attention_report(toy(band(3, 0), band(6, 0)))
    assert attention_report(toy(band(3, 3), FULL)).unlike_mirror_of(causal) == []
    wider = attention_report(toy(band(4, 4), FULL))
    assert [layer.name for layer in wider.unlike_mirror_of(causal)] == ["stack.0"]
    assert wider.narrower_than(causal) == []
    assert attention_report(toy(band(2, 2), FULL)).narrower_than(causal) == []  # a window one too long before
    narrower = attention_report(toy(band(1, 1), band(5, 5)))
    assert [layer.name for layer in narrower.narrower_than(causal)] == ["stack.0", "stack.1"]
    with pytest.raises(ConfigError, match="can't be compared"):
        wider.unlike_mirror_of(attention_report(toy(FULL)))


def test_the_table_is_aligned():
    lines = str(attention_report(toy(FULL, band(6, 0)))).splitlines()
    starts = [[m.start() for m in re.finditer(r"(?<=  )\S|^\S", line)][:6] for line in lines[:3]]
    assert starts[0] == starts[1] == starts[2] and len(starts[0]) == 6
    assert "bidirectional" in lines[1] and "causal" in lines[2]
    assert lines[3].startswith("Toy") and "not bidirectional (1 bidirectional, 1 causal)" in lines[3]


def test_assert_bidirectional():
    assert assert_bidirectional(toy(FULL)) is None
    with pytest.raises(StillCausalError, match="1 causal") as caught:
        assert_bidirectional(toy(FULL, band(6, 0)))
    assert "stack.1" in str(caught.value)


def test_errors_say_what_was_given():
    with pytest.raises(UnsupportedModelError, match="not str"):
        attention_report("a name")
    with pytest.raises(UnsupportedModelError, match="Linear holds no transformers model"):
        attention_report(nn.Linear(2, 2))
    for length in (2, 0, -1, 129, True, 7.0, "7"):
        with pytest.raises(ValueError, match=f"at least 3 .*not {length!r}$") as caught:
            attention_report(toy(FULL), length=length)
        assert isinstance(caught.value, BidirectPatchError)
    with pytest.raises(UnsupportedModelError, match="meta device.*bidirect-patch check"):
        attention_report(toy(FULL).to("meta"))
    with pytest.raises(UnsupportedModelError, match="no decoder layer of Toy"):
        attention_report(Toy().eval())
    assert issubclass(UnsupportedModelError, BidirectPatchError)
