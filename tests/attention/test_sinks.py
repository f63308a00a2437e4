"""Sink tokens: the first tokens of each sequence stay causal, and in sinkless layers the others don't see them.

Each result is compared with the decoder in plain torch, or with an unpatched twin whose attention modules are given a mask that
loops made, or with the causal model.
"""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.attention import packed_sdpa
from bidirect_patch.attention.padding_and_packing import read_sequences
from bidirect_patch.attention.ready_mask import make_mask
from bidirect_patch.errors import AttentionMaskError, CausalMaskWarning, OrderError, UnsupportedModelError
from bidirect_patch.model.windows import Span

from ..helpers.references.plain_decoder import hidden_states, reach
from ..helpers.seeing import reached
from ..helpers.slow import some_slow
from ..helpers.tiny_models import each_family
from ..helpers.versions import BACKENDS, TRANSFORMERS
from .test_backends import CLOSE, IDS, INPUTS, LEFT, ONES, PACKED, RIGHT

# Values marked rare are like the others: FlashAttention 3 and 4 are told the same as 2, and the masks of FlexAttention, of each
# number of sinks and of each window are looked up in the table of test_masks.py. Uncompiled, FlexAttention makes them slowly.
slow, rare = pytest.mark.slow, pytest.mark.rare


def some_rare(values, is_rare):
    """`values` to parametrize with, those marked slow and rare of which that is so."""
    return [pytest.param(value, marks=(slow, rare) if is_rare(value) else ()) for value in values]


def is_rare_backend(name):
    return name[-1] in "34" or name.startswith("flex")


each_backend = pytest.mark.parametrize("backend", some_rare(BACKENDS, is_rare_backend))
# of a model of two layers
NUMBERS = [(2, 0), (1, 1), *(pytest.param(*pair, marks=(slow, rare)) for pair in ((1, 0), (2, 1), (3, 0), (3, 2)))]
each_number = pytest.mark.parametrize("sinks, sinkless", NUMBERS)


def with_sinks(model, sinks, sinkless=0):
    return enable_bidirectional(model, num_sink_tokens=sinks, num_sinkless_layers=sinkless)


def why_refused(backend, sinks, sinkless, window=None, family="llama"):
    """Why an older release can't have these, or None."""
    if TRANSFORMERS < Version("4.42") and window and 0 < sinkless < 2 and not backend.startswith("flash"):
        return "Mistral's mask code takes one mask for all layers"
    told = Version("4.47" if family == "llama" else "4.48")
    if Version("4.43") <= TRANSFORMERS < told and backend.startswith("flash") and sinks == 1 and sinkless:
        return "FlashAttention is told sequences by positions, which can't tell a sequence of one token"
    return None


def enabled(make_model, family, backend, sinks, sinkless, **settings):
    """A model of two layers with sinks; a skip where it is seen to be refused."""
    model = make_model(family, backend, **settings)
    if why := why_refused(backend, sinks, sinkless, settings.get("sliding_window"), family):
        with pytest.raises((UnsupportedModelError, AttentionMaskError)):
            with_sinks(model, sinks, sinkless).model(IDS)
        pytest.skip(why)
    return with_sinks(model, sinks, sinkless)


def masks(model, inputs, sinks, sinkless, windows=None):
    """Who sees whom in each layer: bool (batch, query, key), a list."""
    layers = model.config.num_hidden_layers
    real = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
    positions = inputs.get("position_ids")
    return [
        reach(real, positions, window, sinks=sinks, sees_sinks=i < layers - sinkless)
        for i, window in enumerate(windows or [None] * layers)
    ]


def check(model, inputs, sinks, sinkless, windows=None):
    """Compare with the plain decoder where there is a token, and see that nothing is infinite where there is none."""
    real = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
    with torch.no_grad():
        out = model.model(**inputs).last_hidden_state
        allowed = masks(model, inputs, sinks, sinkless, windows)
        expected = hidden_states(model, inputs["input_ids"], allowed, inputs.get("position_ids"))
    assert out.isfinite().all()
    torch.testing.assert_close(out[real], expected[real], **CLOSE)


def batches(*names):
    """Inputs of these names, of two rows and of each row alone."""
    for name in names or INPUTS:
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
            yield {"input_ids": IDS[rows]} | {key: value[rows] for key, value in INPUTS[name].items()}


# --- what sinks are ---


@each_backend
@pytest.mark.parametrize("sinks", some_rare([1, 3], lambda sinks: sinks == 3))
def test_the_states_of_sinks_are_the_causal_models(make_model, backend, sinks):
    model = make_model("llama", backend, num_hidden_layers=3)
    close = dict(atol=1e-5 if backend.startswith("flash") else 1e-6, rtol=1e-5)  # run alone, matrices have other sizes
    for name in ("no-mask", "right", "left", "holes"):
        inputs = {"input_ids": IDS, **INPUTS[name]}
        real = inputs.get("attention_mask", ONES).bool()
        is_sink = real & (real.cumsum(-1) <= sinks)
        with torch.no_grad():
            causal = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            for sinkless in (0, 1, 3):
                if sinkless and name == "holes" and backend.startswith("flash") or why_refused(backend, sinks, sinkless):
                    continue
                with bidirectional(model, num_sink_tokens=sinks, num_sinkless_layers=sinkless):
                    found = model(**inputs, output_hidden_states=True).hidden_states
                for mine, theirs in zip(found, causal, strict=True):
                    torch.testing.assert_close(mine[is_sink], theirs[is_sink], **close)
                assert (found[-1] - causal[-1])[real & ~is_sink].abs().amax(-1).min() > 1e-3 or sinkless == 0


@each_family
def test_who_moves_whom(make_model, family):
    """The last token moves all but the sinks, and sinks move nobody in a model whose layers are all sinkless."""
    model = with_sinks(make_model(family), 2)
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[:2] = expected[:2].tril()
    assert torch.equal(reached(model), expected) and is_bidirectional(model)
    with_sinks(model, 2, 1)
    assert torch.equal(reached(model), expected), "the first layer sees them"
    with_sinks(model, 2, 2)
    expected[2:, :2] = False
    assert torch.equal(reached(model), expected) and is_bidirectional(model)
    enable_bidirectional(model)
    assert reached(model).all()
    disable_bidirectional(model)
    assert torch.equal(reached(model), torch.ones(8, 8, dtype=torch.bool).tril())


def test_which_layers_see_the_sinks(make_model):
    """The first token's state is moved before one layer at a time."""
    model = with_sinks(make_model(num_hidden_layers=4), 1, 2)

    def move(module, args, kwargs):
        states = (args[0] if args else kwargs["hidden_states"]).clone()
        states[:, 0] += 1.0
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    outputs, moved = [], []
    for layer in model.model.layers:
        watch = layer.register_forward_hook(lambda _, __, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0]))
        with torch.no_grad():
            model(IDS)
            hook = layer.register_forward_pre_hook(move, with_kwargs=True)
            model(IDS)
        watch.remove(), hook.remove()
        moved.append((outputs[-1] - outputs[-2]).abs().amax(-1) > 1e-6)
    assert all(each[:, 0].all() for each in moved)
    assert [bool(each[:, 1:].all()) for each in moved] == [True, True, False, False]
    assert [bool(each[:, 1:].any()) for each in moved] == [True, True, False, False]


@each_backend
@pytest.mark.parametrize("length", some_rare([1, 2, 3], lambda length: length != 2))
def test_a_text_of_nothing_but_sinks_is_causal(make_model, backend, length):
    model = make_model("llama", backend)
    with torch.no_grad():
        causal = model.model(IDS[:, :length], use_cache=False).last_hidden_state
        for sinkless in (0, 2):
            found = with_sinks(model, 3, sinkless).model(IDS[:, :length]).last_hidden_state
            torch.testing.assert_close(found, causal, atol=1e-5, rtol=1e-5)


@each_backend
def test_no_sinks_is_what_no_argument_gives(make_model, backend):
    model, same = make_model("mistral", backend, sliding_window=4), make_model("mistral", backend, sliding_window=4)
    enable_bidirectional(model)
    enable_bidirectional(with_sinks(same, 2), num_sink_tokens=0, num_sinkless_layers=0)
    for inputs in batches("no-mask", "right"):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, same(**inputs).logits)
    assert repr(model) == repr(same)


# --- backends ---


@pytest.mark.parametrize("backend", some_slow(BACKENDS, is_rare_backend))  # with every number
@each_number
def test_every_mask_on_every_backend(make_model, backend, sinks, sinkless):
    model = enabled(make_model, "llama", backend, sinks, sinkless)
    for name in INPUTS:
        for inputs in batches(name):
            if sinkless and name == "holes" and backend.startswith("flash"):
                with pytest.raises(AttentionMaskError, match="sinkless layer"):
                    model(**inputs)
                continue
            check(model, inputs, sinks, sinkless)


def test_flex_attention_has_sinks(make_model):
    """One case of the many, for the version matrix."""
    model = with_sinks(make_model("mistral", "flex_attention", sliding_window=3), 2, 2)
    check(model, {"input_ids": IDS, "attention_mask": LEFT}, 2, 2, windows=[3, 3])


@each_backend
@each_number
@pytest.mark.parametrize("family", some_rare(["gemma", "qwen2"], lambda family: family == "qwen2"))
def test_every_family_on_every_backend(make_model, family, backend, sinks, sinkless):
    model = enabled(make_model, family, backend, sinks, sinkless)
    for inputs in batches("no-mask", "left"):
        check(model, inputs, sinks, sinkless)


@each_backend
@each_number
@pytest.mark.parametrize("window", some_rare([2, 3, 9], lambda window: window != 3))
def test_windows(make_model, backend, window, sinks, sinkless):
    model = enabled(make_model, "mistral", backend, sinks, sinkless, sliding_window=window)
    names = ("no-mask", "right", "left", "packed", "packed-and-padded")
    if backend.startswith("flash") and Version("4.43") <= TRANSFORMERS < Version("4.45"):
        names = names[:3]  # transformers' own code for packed rows can't reshape Mistral's repeated keys there, and says so
    for inputs in batches(*names):
        check(model, inputs, sinks, sinkless, windows=[window, window])


@each_backend
@each_number
@pytest.mark.skipif(TRANSFORMERS < Version("4.53"), reason="before config.layer_types backends disagree about which layers slide")
def test_layers_of_different_reach(make_model, backend, sinks, sinkless):
    settings = dict(use_sliding_window=True, sliding_window=3, max_window_layers=1, num_hidden_layers=3)
    model = with_sinks(make_model("qwen2", backend, **settings), sinks, sinkless)
    for inputs in batches("no-mask", "right", "left", "packed"):
        check(model, inputs, sinks, sinkless, windows=[None, 3, 3])


@each_backend
@each_number
@pytest.mark.skipif(TRANSFORMERS < Version("4.53"), reason="no FlashAttention is told cu_seq_lens_q there")
def test_lengths_given(make_model, backend, sinks, sinkless):
    """One row without padding, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes it."""
    model = with_sinks(make_model("llama", backend), sinks, sinkless)
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=6, max_length_k=6)
    inputs = dict(input_ids=IDS[:1], position_ids=PACKED[:1])
    with torch.no_grad():
        found = model.model(**inputs, **lengths).last_hidden_state
        expected = hidden_states(model, IDS[:1], masks(model, inputs, sinks, sinkless), PACKED[:1])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("backend", some_rare([b for b in BACKENDS if not b.startswith("flex")], is_rare_backend))
@each_number
@pytest.mark.parametrize("window", some_rare([None, 3], lambda window: window is None))
def test_gradients_are_the_plain_decoders(make_model, backend, window, sinks, sinkless):
    """FlexAttention has no gradients on a CPU."""
    model = enabled(make_model, "mistral", backend, sinks, sinkless, sliding_window=window)
    real, inputs = RIGHT.bool(), dict(input_ids=IDS, attention_mask=RIGHT)
    weight = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(7))
    (model.model(**inputs).last_hidden_state * weight)[real].sum().backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # state_dict detaches, so the plain decoder gets the parameters themselves
    model.state_dict = lambda: dict(model.named_parameters())
    allowed = masks(model, inputs, sinks, sinkless, [window, window])
    (hidden_states(model, IDS, allowed) * weight)[real].sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("reentrant", [True, pytest.param(False, marks=slow)], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(make_model, backend, reentrant):
    model = with_sinks(make_model(backend=backend).train(), 2, 1)

    def gradients():
        model.zero_grad()
        model(IDS, attention_mask=RIGHT, use_cache=False).logits[RIGHT.bool()].square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_backend_is_switched_after_enabling(make_model):
    model = with_sinks(make_model("llama", "eager"), 2, 1)
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip(f"transformers {TRANSFORMERS} can't switch a model's backend")
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        for inputs in batches("no-mask", "left"):
            check(model, inputs, 2, 1)


# --- other families, against an unpatched twin whose attention modules are given masks ---


def under(model, allowed, **inputs):
    """The last hidden states of an unpatched model on eager, whose i-th layer's attention is given the mask `allowed[i]`."""

    def give(mask):
        added = torch.zeros(mask[:, None].shape).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": added})

    hooks = [
        layer.self_attn.register_forward_pre_hook(give(mask), with_kwargs=True)
        for layer, mask in zip(model.layers, allowed, strict=True)
    ]
    try:
        return model(**inputs, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
)


def llama4(backend):
    """Chunks of 4 in all layers but the last."""
    sizes = SIZES | dict(intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=2, attention_chunk_size=4)
    return transformers.Llama4TextConfig(**sizes), [dict(chunk=4)] * 3 + [{}]


def gemma3(backend):
    """Windows of 3 but in the second and the last layer."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return transformers.Gemma3TextConfig(**SIZES, sliding_window=3, layer_types=kinds), [dict(window=3), {}] * 2


@each_backend
@pytest.mark.parametrize("sinks, sinkless", [(2, 1), *(pytest.param(*n, marks=(slow, rare)) for n in ((1, 2), (3, 0), (5, 4)))])
@pytest.mark.parametrize("make_config", [llama4, gemma3])
@pytest.mark.skipif(TRANSFORMERS < Version("4.57"), reason="before 4.57 chunks are counted in other ways by each backend")
def test_chunks_and_windows_of_some_layers(make_model, backend, make_config, sinks, sinkless):
    make_model(backend=backend)  # skips, or puts the stand-in for FlashAttention in place
    config, reaches = make_config(backend)
    torch.manual_seed(0)
    cls = getattr(transformers, type(config).__name__.replace("Config", "Model"))
    twin = cls._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    try:
        model = cls._from_config(config, attn_implementation=backend).eval()
    except ValueError as error:  # whatever the class says of its backends
        pytest.skip(str(error)[:80])
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.load_state_dict(twin.state_dict())
    with_sinks(model, sinks, sinkless)
    for inputs in batches("no-mask", "right", "left", "packed"):
        real = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
        allowed = [
            reach(real, inputs.get("position_ids"), sinks=sinks, sees_sinks=i < 4 - sinkless, **limits)
            for i, limits in enumerate(reaches)
        ]
        with torch.no_grad():
            found, expected = model(**inputs).last_hidden_state, under(twin, allowed, **inputs)
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


# --- graphs ---


@slow
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("eager", marks=rare)])
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=rare)])
def test_one_graph_when_compiled(make_model, backend, padded):
    torch._dynamo.reset()
    model = make_model(backend=backend, head=False)
    inputs = dict(input_ids=IDS, use_cache=False) | ({"attention_mask": RIGHT} if padded else {})
    real = (RIGHT if padded else ONES).bool()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        try:
            compiled(**inputs)
        except Exception as error:  # whatever Dynamo raises
            pytest.skip(f"stock Llama of transformers {TRANSFORMERS} isn't one graph: {str(error)[:80]!r}")
        for sinks, sinkless in ((2, 1), (0, 0)):
            with bidirectional(model, num_sink_tokens=sinks, num_sinkless_layers=sinkless):
                found = compiled(**inputs).last_hidden_state
            expected = hidden_states(model, IDS, masks(model, inputs, sinks, sinkless))
            torch.testing.assert_close(found[real], expected[real], **CLOSE)
    torch._dynamo.reset()


def traced(run, example):
    return torch.jit.trace(run, example, check_trace=False)


def exported(run, example):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = run.model

        def forward(self, ids, mask):
            return run(ids, mask)

    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    return torch.export.export(Module(), example, dynamic_shapes=(shape, shape)).module()


@pytest.mark.parametrize("write", [traced, pytest.param(exported, marks=slow)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it compares shapes, which a trace keeps
def test_what_was_recorded_runs_at_other_lengths(make_model, write, window):
    model = enabled(make_model, "mistral", "sdpa", 2, 1, sliding_window=window).requires_grad_(False)

    def run(ids, mask):
        return model.model(input_ids=ids, attention_mask=mask, return_dict=False)[0]

    run.model = model
    recorded = write(run, (IDS[:, :5].clone(), ONES[:, :5].clone()))
    for inputs in batches("ones", "right", "left"):
        allowed = masks(model, inputs, 2, 1, [window, window])
        expected = hidden_states(model, inputs["input_ids"], allowed)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(recorded(*inputs.values())[real], expected[real], atol=1e-4, rtol=1e-4)


# --- SDPA without a mask: on a GPU, the sinks are run apart ---


@pytest.mark.parametrize("span", [Span(sinks=n, sees_sinks=sees) for n in (1, 3) for sees in (True, False)], ids=str)
def test_sinks_run_apart_give_what_the_mask_gives(monkeypatch, span):
    calls = []
    attention = scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[2], key.shape[2], attn_mask is None))
        return attention(query, key, value, attn_mask, **kwargs)

    sequences = read_sequences(None, None, None, 2, 9, torch.device("cpu"))
    plain = make_mask(sequences, (span,), "eager", torch.float32)
    apart = packed_sdpa.sinks_apart(sequences, span)
    mask = packed_sdpa.PackedMask.of(plain, apart)
    q, k, v = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_().unbind()
    want = scaled_dot_product_attention(q, k, v, plain, scale=0.3)
    found = scaled_dot_product_attention(q, k, v, mask[:, :, :, :9], scale=0.3)
    monkeypatch.setattr(packed_sdpa, "scaled_dot_product_attention", spy)
    assert torch.equal(packed_sdpa._attention(q, k, v, mask, scale=0.3), found)
    n = span.sinks
    assert calls == [(n, n, True), (9 - n, 9 if span.sees_sinks else 9 - n, True)], "no call has a mask"
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, want)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_sinks_are_run_apart_only_where_nothing_else_is_hidden():
    def apart(span, length=9, **given):
        mask = given.get("mask")
        sequences = read_sequences(mask, given.get("positions"), None, 1, length, torch.device("meta"))
        found = packed_sdpa.with_lengths(torch.zeros(1, 1, length, length), sequences, (span,))
        return isinstance(found, packed_sdpa.PackedMasks) and found.by_span[0] is not None

    assert apart(Span(sinks=2)) and apart(Span(sinks=2, sees_sinks=False)) and apart(Span(sinks=1, window=9))
    assert not apart(Span()) and not apart(Span(sinks=1, window=8)) and not apart(Span(sinks=1, chunk=4))
    assert not apart(Span(sinks=9)), "nothing but sinks"


@pytest.mark.parametrize("sinks, sinkless", [(2, 1), (1, 0)])
def test_a_model_whose_sinks_run_apart(monkeypatch, make_model, sinks, sinkless):
    """As on a GPU: the mask that a model hands on is made to carry its sinks."""
    model = with_sinks(make_model(), sinks, sinkless)
    expected = [model(**inputs).logits for inputs in batches("no-mask")]
    used = []

    def with_sinks_apart(mask, sequences, spans):
        masks = mask.as_subclass(packed_sdpa.PackedMasks)
        masks.by_span = [packed_sdpa.sinks_apart(sequences, span) for span in spans]
        return masks

    def attention(*args, **kwargs):
        used.append(True)
        return original(*args, **kwargs)

    original = packed_sdpa._attention
    monkeypatch.setattr(packed_sdpa, "with_lengths", with_sinks_apart)
    monkeypatch.setattr(packed_sdpa, "_attention", attention)
    for inputs, wanted in zip(batches("no-mask"), expected):
        used.clear()
        torch.testing.assert_close(model(**inputs).logits, wanted, **CLOSE)
        assert len(used) == 2


# --- masks of the user's own, and layers by themselves ---


def test_a_ready_mask_stays_the_users(make_model):
    model = with_sinks(make_model(), 2, 1)
    for allowed in (torch.ones(2, 10, 10, dtype=torch.bool), reach(RIGHT.bool(), window=3)):
        with torch.no_grad():
            found = model.model(IDS, attention_mask=allowed[:, None]).last_hidden_state
            expected = hidden_states(model, IDS, allowed)
        real = allowed.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(found[real], expected[real], **CLOSE)


def test_a_ready_mask_is_refused_where_the_models_own_mask_is_mirrored():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.FalconModel(transformers.FalconConfig(**sizes, alibi=True)).eval()
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    with_sinks(model, 1)
    with pytest.raises(AttentionMaskError):
        model(IDS, attention_mask=mask)
    with torch.no_grad():
        model(IDS, attention_mask=ONES)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("sinks, sinkless", [(2, 1), (1, 0)])
def test_a_forward_taken_before_has_sinks_or_says_so(make_model, backend, sinks, sinkless):
    model = make_model(backend=backend, head=False)
    forward = model.forward
    with_sinks(model, sinks, sinkless)
    inputs = dict(input_ids=IDS, attention_mask=RIGHT)
    with torch.no_grad():
        try:
            found = forward(**inputs, use_cache=False).last_hidden_state
        except OrderError as error:
            assert backend == "flash_attention_2" and "call the model" in str(error)
            return
        expected = hidden_states(model, IDS, masks(model, inputs, sinks, sinkless))
    torch.testing.assert_close(found[RIGHT.bool()], expected[RIGHT.bool()], **CLOSE)


def test_sinks_alone_warn_of_no_causal_mask(make_model, recwarn):
    with_sinks(make_model(), 20)(IDS)
    assert not [w for w in recwarn if issubclass(w.category, CausalMaskWarning)]
