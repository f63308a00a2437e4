"""Which decoders are found in a model."""

import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from bidirect_patch import assert_bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.config import says_bidirectional
from bidirect_patch.model.facts import causal_flags, is_attention
from bidirect_patch.model.find import decoders
from bidirect_patch.model.windows import Span

from ..helpers import zoo
from ..helpers.on_meta import BART, TINY, VISION, made
from ..helpers.one_text import BOTH, CAUSAL, moves
from ..helpers.seeing import hidden, sees_all
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.tiny_models import each_family, tiny_config, tiny_model
from ..helpers.versions import TRANSFORMERS


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
    assert not decoder.refusals and not decoder.is_on_meta


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
    assert len(decoder.attentions) == attentions and not decoder.refusals


def test_two_decoders_in_one_module():
    two = nn.ModuleDict({"query": tiny_model(), "text": tiny_model("mistral", head=False)})
    assert [decoder.name for decoder in decoders(two)] == ["query.model", "text"]


def test_a_vision_tower_is_none_of_the_decoders():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=tiny_config("llama"), image_token_index=3
    )
    with torch.device("meta"):
        (decoder,) = decoders(transformers.LlavaForConditionalGeneration(config))
    assert isinstance(decoder.module, transformers.LlamaModel) and not decoder.refusals


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


@pytest.mark.parametrize("name", ["forward", "their_forward", "wrapper"])
def test_a_forward_that_a_tool_has_put_on_the_class(monkeypatch, name):
    """Under its own name, or by a decorator that keeps nothing of what it is put around."""
    cls = transformers.LlamaModel
    stock = cls.forward

    def wrapper(self, input_ids=None, attention_mask=None, **kwargs):
        return stock(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def their_forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    their_forward.__signature__ = inspect.signature(stock)
    before = enable_bidirectional(tiny_model(head=False))
    monkeypatch.setattr(cls, "forward", {"forward": stock, "their_forward": their_forward, "wrapper": wrapper}[name])
    model = enable_bidirectional(tiny_model(head=False))
    assert sees_all(model) and sees_all(enable_bidirectional(before))
    disable_bidirectional(before)
    assert not sees_all(before)
