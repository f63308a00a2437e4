"""Which layer has which window or chunk, by family."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from bidirect_patch.model.find import decoders
from bidirect_patch.model.windows import Span, span_of

FULL, W, C = Span(), Span(window=4), Span(chunk=4)
COMMON = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

# Model class, what its config says, and the span of each layer. A family that the installed transformers lacks is skipped.
SPANS = {
    "llama": ("Llama", {}, [FULL] * 3),
    "llama-with-a-chunk-that-it-does-not-read": ("Llama", dict(attention_chunk_size=4), [FULL] * 3),
    "mistral": ("Mistral", dict(sliding_window=4), [W] * 3),
    "mistral-without-a-window": ("Mistral", dict(sliding_window=None), [FULL] * 3),
    "gemma": ("Gemma", {}, [FULL] * 2),
    "gemma2": ("Gemma2", dict(sliding_window=4), [W, FULL, W, FULL]),
    "gemma3": ("Gemma3Text", dict(sliding_window=4, sliding_window_pattern=3), [W, W, FULL, W, W]),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=2), [FULL, FULL, W, W]),
    "qwen2-from-the-first-layer": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        [W] * 3,
    ),
    "qwen2-above-all-layers": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=9),
        [FULL] * 3,
    ),
    "qwen2-switched-off": ("Qwen2", dict(use_sliding_window=False, sliding_window=4, max_window_layers=0), [FULL] * 3),
    "qwen3": ("Qwen3", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), [FULL, W, W]),
    "phi3": ("Phi3", dict(sliding_window=4), [W] * 2),
    "mixtral": ("Mixtral", dict(sliding_window=4, num_local_experts=2), [W] * 2),
    "cohere2": ("Cohere2", dict(sliding_window=4), [W, W, W, FULL, W]),
    "gpt-oss": ("GptOss", dict(sliding_window=4, num_local_experts=2, head_dim=8), [W, FULL, W, FULL]),
    "llama4": (
        "Llama4Text",
        dict(
            attention_chunk_size=4,
            num_local_experts=2,
            intermediate_size_mlp=48,
            head_dim=8,
            interleave_moe_layer_step=1,
        ),
        [C, C, C, FULL, C],
    ),
}


def model_of(name, settings, layers):
    """The bare model of a family, on meta: its structure alone."""
    config, cls = (getattr(transformers, f"{name}{kind}", None) for kind in ("Config", "Model"))
    if config is None or cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device("meta"):
        return cls(config(**COMMON, **settings, num_hidden_layers=layers))


@pytest.mark.parametrize("name, settings, spans", SPANS.values(), ids=SPANS)
def test_the_span_of_each_layer(name, settings, spans):
    (decoder,) = decoders(model_of(name, settings, len(spans)))
    assert [attention.span for attention in decoder.attentions] == spans
    assert decoder.spans == tuple(dict.fromkeys(spans)), "the different ones, in order of appearance"


@pytest.mark.parametrize("name, settings, spans", SPANS.values(), ids=SPANS)
def test_the_span_is_the_same_while_the_model_is_patched(name, settings, spans):
    """Settings that the patch replaces are read as they are without it."""
    from bidirect_patch.attention.handling import possible_handlings
    from bidirect_patch.attention.plan import bidirectional_plans
    from bidirect_patch.swap.apply import apply

    model = model_of(name, settings, len(spans))
    (decoder,) = decoders(model)
    apply(bidirectional_plans(decoder, possible_handlings(decoder)[0]))
    (again,) = decoders(model)
    assert [attention.span for attention in again.attentions] == spans


@pytest.mark.parametrize(
    "span, length, hides",
    [
        (Span(), 1000, False),
        (Span(window=4), 4, False),
        (Span(window=4), 5, True),
        (Span(chunk=4), 4, False),
        (Span(chunk=4), 5, True),
        (Span(window=8, chunk=4), 5, True),
        (Span(window=4, chunk=8), 5, True),
        (Span(window=4, chunk=8), 4, False),
    ],
)
def test_whether_a_span_hides_anything(span, length, hides):
    assert span.hides_within(length) == hides


@pytest.mark.parametrize(
    "span, limit", [(Span(), None), (Span(window=4), 4), (Span(chunk=8), 8), (Span(4, 8), 4), (Span(8, 4), 4)]
)
def test_the_limit_is_the_smaller_one(span, limit):
    assert span.limit == limit


def test_a_window_over_what_is_generated_is_none_for_a_text():
    """Unlimited-OCR, whose KV cache keeps all of the prompt: as the causal model, each layer sees all of a text."""
    config = SimpleNamespace(layer_types=["reference_sliding_attention", "sliding_attention"], sliding_window=4)
    spans = [span_of(torch.nn.Identity(), f"layers.{i}.self_attn", config, reads_layer_kinds=True) for i in range(2)]
    assert spans == [FULL, W]
