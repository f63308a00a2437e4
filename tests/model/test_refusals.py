"""Which kinds of models and layers are refused, and what is said of each."""

import pytest
import transformers
from torch import nn

from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.find import decoders

from ..helpers.on_meta import BART, MAMBA, T5, TINY, VISION, made
from ..helpers.tiny_models import tiny_model

# What is said of models that hold no decoder; whether their layers would stay causal beside one.
REFUSED = {
    "encoder": ("BertModel", "BertConfig", TINY, "an encoder", False),
    "encoder-with-a-head": ("RobertaForMaskedLM", "RobertaConfig", TINY, "an encoder", False),
    "vision": ("ViTModel", "ViTConfig", VISION, "an encoder", False),
    "encoder-decoder": ("T5ForConditionalGeneration", "T5Config", T5, "an encoder-decoder", True),
    "encoder-decoder-2": ("BartForConditionalGeneration", "BartConfig", BART, "an encoder-decoder", True),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        MAMBA,
        r"its layers \(MambaBlock with MambaMixer\) have no attention",
        True,
    ),
}
each_refused = pytest.mark.parametrize("model, config, settings, said, blocks", REFUSED.values(), ids=REFUSED)


@each_refused
def test_a_model_without_a_decoder_is_refused_by_name(model, config, settings, said, blocks):
    with pytest.raises(UnsupportedModelError, match=f"^{model} has no decoder .*{said}"):
        decoders(made(model, config, **settings))


@each_refused
def test_a_model_without_a_decoder_beside_one(model, config, settings, said, blocks):
    """An encoder is bidirectional as it is; all else would stay causal, and counts as unsupported."""
    both = nn.ModuleDict({"llama": tiny_model(), "other": made(model, config, **settings)})
    (decoder,) = decoders(both)
    assert decoder.name == "llama.model"
    assert bool(decoder.refusals) == blocks
    assert not blocks or decoder.refusals[0].where.startswith("other")


@pytest.mark.parametrize("thing", [None, "gpt2", {}, transformers.LlamaModel], ids=["None", "str", "dict", "class"])
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(UnsupportedModelError, match=f"got {type(thing).__name__}: load the model first"):
        decoders(thing)


def test_a_module_of_torch_alone_is_refused():
    with pytest.raises(
        UnsupportedModelError, match="Sequential has no decoder.*no transformers PreTrainedModel inside"
    ):
        decoders(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2)))


class Mixing(nn.Module):
    """A convolution over positions, in a layer beside attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3)


class FastMamba(nn.Module):
    pass


@pytest.mark.parametrize(
    "part, named",
    [
        (Mixing, "Mixing"),
        (FastMamba, "FastMamba"),
        (lambda: nn.LSTM(4, 4), "LSTM"),
        (lambda: nn.Conv1d(4, 4, 1), None),  # each position alone
        (lambda: nn.Linear(4, 4), None),
        (lambda: nn.LayerNorm(4), None),
    ],
    ids=["convolution", "mamba", "lstm", "pointwise", "linear", "norm"],
)
def test_what_else_mixes_tokens_in_a_layer_is_named(part, named):
    model = tiny_model()
    model.model.layers[1].extra = part()
    (decoder,) = decoders(model)
    assert list(map(str, decoder.refusals)) == ([f"layers.1 LlamaDecoderLayer with {named}"] if named else [])


def test_a_layer_without_attention_is_named():
    model = tiny_model()
    del model.model.layers[0].self_attn
    model.model.layers[0].blend = FastMamba()
    (decoder,) = decoders(model)
    assert [attention.path for attention in decoder.attentions] == ["layers.1.self_attn"]
    assert list(map(str, decoder.refusals)) == ["layers.0 LlamaDecoderLayer with FastMamba"]
