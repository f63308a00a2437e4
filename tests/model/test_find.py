"""Which decoders are found in a model, and what is said of models that hold none."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from bidirect_patch import assert_bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.decoder import causal_flags
from bidirect_patch.model.find import decoders, is_attention, says_bidirectional
from bidirect_patch.model.windows import Span

from ..helpers import zoo
from ..helpers.one_text import BOTH, CAUSAL, moves
from ..helpers.seeing import hidden, sees_all
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.tiny_models import each_family, tiny_config, tiny_model
from ..helpers.versions import TRANSFORMERS

TINY = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
T5 = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
BART = dict(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=8, patch_size=4
)
MAMBA = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)


def made(model, config, **settings):
    """A transformers model on meta: its structure alone."""
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**settings))


@each_family
@pytest.mark.parametrize("head", [True, False], ids=["causal-lm", "bare"])
def test_a_decoder_and_its_attention(family, head):
    model = tiny_model(family, head=head)
    (decoder,) = decoders(model)
    assert decoder.module is (model.model if head else model)
    assert decoder.name == ("model" if head else "")
    assert [attention.path for attention in decoder.attentions] == ["layers.0.self_attn", "layers.1.self_attn"]
    for attention, layer in zip(decoder.attentions, decoder.module.layers, strict=True):
        assert attention.module is layer.self_attn and attention.span == Span()
    assert decoder.outermost is decoder.module and decoder.mask_makers == (decoder.module,)
    assert not decoder.unsupported_layers and not decoder.is_on_meta


def test_a_decoder_on_meta():
    (decoder,) = decoders(made("LlamaModel", "LlamaConfig", **TINY))
    assert decoder.is_on_meta and len(decoder.attentions) == 2


@pytest.mark.parametrize(
    "model, config, settings, attentions",
    [
        ("LlamaForSequenceClassification", "LlamaConfig", TINY, 2),
        ("LlamaForTokenClassification", "LlamaConfig", TINY, 2),
        ("MixtralForCausalLM", "MixtralConfig", TINY | dict(num_key_value_heads=2, num_local_experts=2), 2),
        ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4), 2),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", TINY, 2),
        ("OPTForCausalLM", "OPTConfig", dict(TINY, ffn_dim=48), 2),
        ("BloomForCausalLM", "BloomConfig", dict(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), 2),
        ("MptForCausalLM", "MptConfig", dict(vocab_size=61, d_model=32, n_layers=2, n_heads=4), 2),
        ("BertLMHeadModel", "BertConfig", TINY | dict(is_decoder=True), 2),
        # Its one layer has attention to an encoder too, which is called with none.
        ("BartForCausalLM", "BartConfig", BART | dict(is_decoder=True, is_encoder_decoder=False), 2),
    ],
)
def test_architectures_with_one_decoder(model, config, settings, attentions):
    if not hasattr(transformers, model):
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    (decoder,) = decoders(made(model, config, **settings))
    assert len(decoder.attentions) == attentions and not decoder.unsupported_layers


def test_two_decoders_in_one_module():
    two = nn.ModuleDict({"query": tiny_model(), "text": tiny_model("mistral", head=False)})
    assert [decoder.name for decoder in decoders(two)] == ["query.model", "text"]


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
    assert bool(decoder.unsupported_layers) == blocks
    assert not blocks or decoder.unsupported_layers[0].startswith("other")


def test_a_vision_tower_is_none_of_the_decoders():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=tiny_config("llama"), image_token_index=3
    )
    with torch.device("meta"):
        (decoder,) = decoders(transformers.LlavaForConditionalGeneration(config))
    assert isinstance(decoder.module, transformers.LlamaModel) and not decoder.unsupported_layers


MLLAMA_TEXT = TINY | dict(num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0)
MLLAMA_TEXT |= dict(rope_scaling={"rope_type": "default"})
MLLAMA_VISION = VISION | dict(num_hidden_layers=2, num_global_layers=1, attention_heads=4, image_size=28, patch_size=14)
MLLAMA_VISION |= dict(intermediate_layers_indices=[0, 1], vision_output_dim=96, max_num_tiles=2)
MLLAMA_VISION |= dict(supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])


@pytest.mark.skipif(not hasattr(transformers, "MllamaConfig"), reason="this transformers has no Mllama")
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_vision_tower_whose_base_class_makes_causal_masks(backend):
    """Until 4.57, a method for the text model stands in it."""
    config = transformers.MllamaConfig(vision_config=MLLAMA_VISION, text_config=MLLAMA_TEXT)
    model = transformers.MllamaForConditionalGeneration._from_config(config, attn_implementation=backend)
    model = enable_bidirectional(zoo.randomize(model))
    text = model.get_submodule(decoders(model)[0].name)
    assert [decoder.module for decoder in decoders(model)] == [text] and type(text).__name__ == "MllamaTextModel"
    vision = next(each for each in model.modules() if type(each).__name__ == "MllamaVisionModel")
    with pytest.raises(UnsupportedModelError, match="an encoder: nothing makes a causal mask for its MllamaVision"):
        enable_bidirectional(vision)
    image = dict(
        pixel_values=torch.randn(1, 1, 2, 3, 28, 28),
        aspect_ratio_ids=torch.tensor([[1]]),
        aspect_ratio_mask=torch.tensor([[[1, 0]]]),
        cross_attention_mask=torch.ones(1, 9, 1, 2),
    )
    assert moves(model) == moves(model, **image) == BOTH
    assert_bidirectional(model)
    assert moves(disable_bidirectional(model), **image) == CAUSAL


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
    assert decoder.unsupported_layers == ([f"layers.1 LlamaDecoderLayer with {named}"] if named else [])


def test_a_layer_without_attention_is_named():
    model = tiny_model()
    del model.model.layers[0].self_attn
    model.model.layers[0].blend = FastMamba()
    (decoder,) = decoders(model)
    assert [attention.path for attention in decoder.attentions] == ["layers.1.self_attn"]
    assert decoder.unsupported_layers == ["layers.0 LlamaDecoderLayer with FastMamba"]


def test_the_flags_of_a_module_are_its_own():
    module = nn.Module()
    assert causal_flags(module) == ()
    module.is_causal, module.causal = True, False
    assert causal_flags(module) == ("is_causal",)
    module.causal = True
    assert causal_flags(module) == ("is_causal", "causal")


def test_attention_is_known_by_its_mask_and_its_name_or_flag():
    model = tiny_model()
    assert is_attention(model.model.layers[0].self_attn)
    for other in (model, model.model, model.model.layers[0], model.model.layers[0].mlp, nn.MultiheadAttention(4, 2)):
        assert not is_attention(other), type(other).__name__


@pytest.mark.parametrize(
    "settings, says",
    [
        ({}, False),
        ({"is_causal": True}, False),
        ({"is_causal": False}, True),
        ({"is_causal": None}, False),
        ({"use_bidirectional_attention": True}, True),
        ({"use_bidirectional_attention": "all"}, True),
        ({"use_bidirectional_attention": "vision"}, False),
        ({"use_bidirectional_attention": False}, False),
    ],
    ids=str,
)
def test_what_a_config_says(settings, says):
    assert says_bidirectional(tiny_config("llama", **settings)) == says


def gpt2(backend):
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=backend).eval()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2", "gpt2"])
def test_a_flag_that_a_user_has_set_makes_no_encoder(family, backend):
    """`is_causal = False` on each attention module, as many scripts set it: the model makes its causal mask all the same."""
    if family == "gpt2" and backend == "sdpa" and TRANSFORMERS < Version("4.40"):
        pytest.skip("this transformers has no such backend for GPT-2")
    model = gpt2(backend) if family == "gpt2" else tiny_model(family, backend)
    flagged = [module for module in model.modules() if getattr(module, "is_causal", None) is True]
    if not flagged:
        pytest.skip("this transformers has no such flag there")
    for module in flagged:
        module.is_causal = False
    hidden(model)
    before = snapshot(model)
    enable_bidirectional(model)
    assert sees_all(model)
    assert_same(before, snapshot(disable_bidirectional(model)))
