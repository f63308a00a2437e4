"""Every backend gives the same hidden states on real tokens: those of the decoder in plain torch."""

import copy

import pytest
import torch
from packaging.version import Version

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import OrderError

from ..helpers import one_text
from ..helpers.flash_double import attend
from ..helpers.one_text import BOTH, CAUSAL, moves, moves_real
from ..helpers.references.plain_decoder import hidden_states, reach
from ..helpers.seeing import hidden
from ..helpers.slow import some_slow
from ..helpers.tiny_models import llama
from ..helpers.versions import BACKENDS, TRANSFORMERS

CLOSE = dict(atol=2e-5, rtol=1e-5)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def tokens(rows=2, seq=10):
    return torch.randint(3, 61, (rows, seq), generator=torch.Generator().manual_seed(6))


IDS = tokens()
ONES = torch.ones_like(IDS)
RIGHT = ONES * (torch.arange(10) < torch.tensor([[10], [6]]))
LEFT = RIGHT.flip(1)
HOLES = ONES * (torch.arange(10) % torch.tensor([[3], [4]]) != 1)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 0, 1, 0, 1]])
INPUTS = {
    "no-mask": {},
    "ones": dict(attention_mask=ONES),
    "right": dict(attention_mask=RIGHT),
    "left": dict(attention_mask=LEFT),
    "holes": dict(attention_mask=HOLES),
    "packed": dict(position_ids=PACKED),
    "packed-and-ones": dict(attention_mask=ONES, position_ids=PACKED),
    "packed-and-padded": dict(attention_mask=RIGHT, position_ids=PACKED),
}
each_input = pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)


def check(model, inputs, rows=2, window=None, windows=None):
    """Compare with the plain decoder where there is a token, and see that nothing is infinite where there is none."""
    mask = inputs.get("attention_mask", ONES)[:rows].bool()
    positions = inputs.get("position_ids", None)
    positions = None if positions is None else positions[:rows]
    kwargs = {k: v[:rows] for k, v in inputs.items()}
    with torch.no_grad():
        out = model.model(IDS[:rows], **kwargs).last_hidden_state
        allowed = [reach(mask, positions, w) for w in windows or [window] * model.config.num_hidden_layers]
        expected = hidden_states(model, IDS[:rows], allowed, positions)
    assert out.isfinite().all()
    torch.testing.assert_close(out[mask], expected[mask], **CLOSE)


@each_backend
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2"])
def test_every_backend_is_the_plain_decoder(make_model, family, backend):
    model = enable_bidirectional(make_model(family, backend))
    for name in ("no-mask", "right", "left"):
        check(model, INPUTS[name])
    check(model, {}, rows=1)


@each_backend
@each_input
def test_every_mask_on_every_backend(make_model, backend, inputs):
    model = enable_bidirectional(make_model("llama", backend))
    check(model, inputs)
    check(model, inputs, rows=1)


@each_backend
@pytest.mark.parametrize("window", some_slow([2, 3, 9, 10], lambda window: window in (2, 9)))
def test_windows_are_the_same_distance_on_every_backend(make_model, backend, window):
    model = enable_bidirectional(make_model("mistral", backend, sliding_window=window))
    names = ("no-mask", "right", "left", "packed", "packed-and-padded")
    if backend.startswith("flash") and TRANSFORMERS < Version("4.45") and TRANSFORMERS >= Version("4.43"):
        names = names[:3]  # transformers' own code for packed rows can't reshape Mistral's repeated keys there, and says so
    for name in names:
        check(model, INPUTS[name], window=window)


@each_backend
def test_layers_of_different_reach(make_model, backend):
    if TRANSFORMERS < Version("4.53"):
        pytest.skip(
            "before config.layer_types (4.53) transformers' own backends disagree about which Qwen2 layers slide"
        )
    settings = dict(use_sliding_window=True, sliding_window=3, max_window_layers=1, num_hidden_layers=3)
    model = enable_bidirectional(make_model("qwen2", backend, **settings))
    for name in ("no-mask", "right", "left", "packed"):
        check(model, INPUTS[name], windows=[None, 3, 3])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not b.startswith("flex")])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_the_plain_decoders(make_model, backend, window):
    """FlexAttention has no gradients on a CPU."""
    model = enable_bidirectional(make_model("mistral", backend, sliding_window=window))
    real = RIGHT.bool()
    weight = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(7))
    (model.model(IDS, attention_mask=RIGHT).last_hidden_state * weight)[real].sum().backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # state_dict detaches, so the plain decoder gets the parameters themselves
    model.state_dict = lambda: dict(model.named_parameters())
    (hidden_states(model, IDS, reach(real, window=window)) * weight)[real].sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_is_told(make_model, flash_double, backend):
    """The kernel itself gets causal=False, real tokens alone, and each packed document by its length."""
    model = make_model("llama", backend)
    calls = flash_double.calls
    with torch.no_grad(), bidirectional(model):
        calls.clear()  # those of the small model that was verified
        model(IDS)
        assert [call.causal for call in calls] == [False, False]
        assert {call.function for call in calls} == {"flash_attn_func"}, "nothing is padded: the dense kernel"
        calls.clear()
        model(IDS, attention_mask=RIGHT)
        assert [(call.causal, call.cu_seqlens) for call in calls] == [(False, [0, 10, 16])] * 2
        calls.clear()
        model(IDS[:1], position_ids=PACKED[:1])
        assert [(call.causal, call.cu_seqlens) for call in calls] == [(False, [0, 4, 10])] * 2
        calls.clear()
    with torch.no_grad():
        model(IDS, use_cache=False)
        assert [call.causal for call in calls] == [True, True]


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_with_lengths_given(make_model, backend):
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives."""
    if TRANSFORMERS < Version("4.53"):
        pytest.skip(f"transformers {TRANSFORMERS} doesn't hand cu_seq_lens_q on to FlashAttention")
    model = enable_bidirectional(make_model("llama", backend))
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=6, max_length_k=6)
    with torch.no_grad():
        out = model.model(IDS[:1], position_ids=PACKED[:1], **lengths).last_hidden_state
        expected = hidden_states(model, IDS[:1], reach(ONES[:1].bool(), PACKED[:1]), PACKED[:1])
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.slow
def test_flex_attention_compiled(make_model):
    """FlexAttention as it is really run: compiled, on the CPU."""
    if TRANSFORMERS < Version("4.57"):
        pytest.skip(f"transformers {TRANSFORMERS} wants what compiled FlexAttention has on a GPU only")
    model = make_model("mistral", "flex_attention", sliding_window=3, num_hidden_layers=1, hidden_size=64, head_dim=16)
    with torch.no_grad(), torch.compiler.set_stance("default"), bidirectional(model):
        out = model.model(IDS, attention_mask=RIGHT).last_hidden_state
    real = RIGHT.bool()
    expected = hidden_states(model, IDS, reach(real, window=3))
    torch.testing.assert_close(out[real], expected[real], **CLOSE)


def test_switched_backend_after_enabling(make_model):
    model = enable_bidirectional(make_model("llama", "eager"))
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip(f"transformers {TRANSFORMERS} can't switch a model's backend")
    check(model, INPUTS["left"])
    model.set_attn_implementation("sdpa")
    check(model, INPUTS["left"])
    check(model, INPUTS["no-mask"])
    disable_bidirectional(model)
    with torch.no_grad():
        causal = hidden_states(model, IDS, reach(ONES.bool(), causal=True))
        torch.testing.assert_close(model.model(IDS).last_hidden_state, causal, **CLOSE)


@pytest.mark.parametrize("model_backend, layer_backend", [("sdpa", "eager"), ("eager", "sdpa")])
@pytest.mark.parametrize("sinks", [0, 1])
def test_one_layer_may_have_another_backend(make_model, model_backend, layer_backend, sinks):
    model = make_model("llama", model_backend)
    if type(model.model.layers[0].self_attn).__name__ != "LlamaAttention":
        pytest.skip("this transformers has a class for each backend")
    enable_bidirectional(model, num_sink_tokens=sinks)
    want = hidden(model)
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = layer_backend
    torch.testing.assert_close(hidden(model), want, atol=1e-5, rtol=1e-5)


def test_flash_put_in_after_enabling_keeps_the_window_or_says_so(make_model):
    reference = enable_bidirectional(make_model("mistral", "eager", sliding_window=3))
    model = make_model("mistral", "flash_attention_2", sliding_window=3)
    if type(model.model.layers[0].self_attn).__name__ != "MistralAttention":
        pytest.skip("this transformers has a class for each backend")
    model.config._attn_implementation = "eager"
    enable_bidirectional(model)
    model.config._attn_implementation = "flash_attention_2"
    try:
        out = hidden(model)
    except OrderError as error:
        assert "changed to FlashAttention" in str(error)
    else:
        torch.testing.assert_close(out, hidden(reference), atol=1e-5, rtol=1e-5)


# --- the double itself ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (2, 2), (3, 0), (0, 1)])
@pytest.mark.parametrize("queries", [7, 4])
def test_the_doubles_attention_is_torchs(causal, window, queries):
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(n, h, 8, generator=generator) for n, h in ((queries, 4), (7, 2), (7, 2)))
    ahead = torch.arange(7)[None, :] - (torch.arange(queries)[:, None] + 7 - queries)
    left, right = window[0] if window[0] >= 0 else 99, 0 if causal else window[1] if window[1] >= 0 else 99
    allowed = (ahead >= -left) & (ahead <= right)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=allowed, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, causal=causal, window_size=window), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (3, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_doubles_attention_is_flash_attentions(causal, window):
    flash_attn = pytest.importorskip("flash_attn", reason="flash_attn isn't installed")
    q, k, v = (torch.randn(1, 16, h, 32, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    out = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(
        out[0], attend(q[0], k[0], v[0], causal=causal, window_size=window), atol=2e-2, rtol=2e-2
    )


# --- real weights ---


@pytest.mark.slow
def test_real_weights_on_real_text(load_real):
    """SmolLM2-135M on two paragraphs: the backends agree, the first token sees the last, and the way back is exact."""
    from pydoc_data.topics import topics

    sdpa, tokenizer = load_real(attn_implementation="sdpa")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([topics["while"][:120], topics["assert"][:60]], return_tensors="pt", padding=True)
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    assert not real.all()
    with torch.no_grad():
        stock = sdpa(**batch, use_cache=False).logits
        plain = hidden_states(sdpa, batch["input_ids"], reach(real), theta=100000.0)
        with bidirectional(sdpa):
            full = sdpa.model(**batch).last_hidden_state
            changed = dict(batch, input_ids=batch["input_ids"].clone())
            changed["input_ids"][0, -1] = 1
            assert (sdpa.model(**changed).last_hidden_state - full)[0, 0].abs().max() > 1e-4
        assert torch.equal(sdpa(**batch, use_cache=False).logits, stock)
    torch.testing.assert_close(full[real], plain[real], atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_flex_attention_in_every_order_on_a_cpu():
    if TRANSFORMERS < Version("4.53"):
        pytest.skip("the first release whose FlexAttention runs on a CPU is 4.53")
    torch._dynamo.reset()
    model = llama(backend="flex_attention").requires_grad_(False)
    assert moves(model) == CAUSAL
    enable_bidirectional(model)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert moves(model) == moves(model, attention_mask=one_text.ONES) == BOTH
    assert moves_real(model) == BOTH[:7]
    assert moves(model, position_ids=packed) == "000011111"
    ids = torch.arange(3, 24)[None]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert moves(model, ids=ids, attention_mask=mask)[5:] == "1" * 16
    assert moves(disable_bidirectional(model)) == CAUSAL
