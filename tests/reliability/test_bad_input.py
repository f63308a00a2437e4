"""Bad input to every public name, as one table: a clear error of this package, before anything is changed.

Left out is what transformers or Python reports by itself, and well: no input at all, an unknown keyword of a function, ids
that are no tensor or that the embedding lacks.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationMixin, LlamaForSequenceClassification, LlamaModel

from bidirect_patch import (
    MNTPCollator,
    apply_mntp_head,
    assert_bidirectional,
    attention_report,
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
    supported_architectures,
)
from bidirect_patch.errors import (
    ArgumentError,
    AttentionMaskError,
    BidirectPatchError,
    CacheError,
    CollatorError,
    ConfigError,
    GenerateError,
    HeadError,
    MaskTokenError,
    OrderError,
    StillCausalError,
    UnsupportedModelError,
)
from bidirect_patch.head import remove_mntp_head
from bidirect_patch.mntp.metrics import mntp_metrics

from ..helpers.one_text import IDS
from ..helpers.tiny_models import SIZES, causal_lm, llama
from ..helpers.twins import described
from ..helpers.words import make_tokenizer

BUILTIN = {
    ArgumentError: TypeError,
    AttentionMaskError: ValueError,
    CacheError: ValueError,
    CollatorError: ValueError,
    ConfigError: ValueError,
    GenerateError: RuntimeError,
    HeadError: TypeError,
    MaskTokenError: ValueError,
    OrderError: RuntimeError,
    StillCausalError: AssertionError,
    UnsupportedModelError: TypeError,
}
N = IDS.shape[1]
TWO = torch.cat([IDS, IDS + 1])
ONES, POSITIONS = torch.ones(1, N), torch.arange(N)[None]
LABELS = IDS + 1  # hidden in the input
LABELS[:, ::2] = -100
EMBEDS = torch.zeros(1, N, SIZES["hidden_size"])
DENSE = torch.zeros(1, 1, N, N)
TEXT = [5, 6, 7]
SEQUENCES = torch.tensor([0, 4, N], dtype=torch.int32)


def boundaries(*ends):
    return torch.tensor(ends, dtype=torch.int32)


def enter(model, *args, **kwargs):
    with bidirectional(model, *args, **kwargs):
        pass


def enter_twice(model):
    block = bidirectional(model)
    with block, block:
        pass


def without_head(model):
    model.lm_head = torch.nn.ModuleList([model.lm_head])
    return model


def with_dict(*kinds, value=None):
    return {kind: value for kind in kinds}


class Row(NamedTuple):
    """A call that must fail."""

    id: str
    call: Callable[[Any], Any]
    error: type[BidirectPatchError]
    word: str  # of the message: what was given, or what to do


def forward(name, call, error, word):
    """A call of `x.model` or `x.head`, on each backend."""
    return Row(f"forward-{name}", call, error, word)


def feature(name, text, word):
    """A text that a collator can't read."""
    return Row(f"feature-{name}", lambda x: x.collator([{"input_ids": TEXT}, text]), CollatorError, word)


def setting(name, word, **settings):
    """A setting that a collator can't have."""
    return Row(f"collator-{name}", lambda x: MNTPCollator(x.tokenizer, **settings), CollatorError, word)


def mask(name, given, word):
    return forward(f"mask-{name}", lambda x: x.model(IDS, attention_mask=given()), AttentionMaskError, word)


def positions(name, given, word):
    return forward(f"positions-{name}", lambda x: x.model(IDS, position_ids=given()), AttentionMaskError, word)


def sequences(name, given, word):
    return forward(f"cu-seq-lens-{name}", lambda x: x.model(IDS, cu_seq_lens_q=given()), AttentionMaskError, word)


def labels(name, given, word):
    return forward(f"labels-{name}", lambda x: x.head(input_ids=IDS, labels=given()), HeadError, word)


def loss(name, word, **kwargs):
    return forward(f"loss-{name}", lambda x: x.head(input_ids=IDS, labels=LABELS, **kwargs), HeadError, word)


NO_MODULES = {
    "none": (lambda x: None, "NoneType"),
    "path": (lambda x: "meta-llama/Llama-3.2-1B", "str"),
    "class": (lambda x: LlamaModel, "type"),
    "config": (lambda x: x.stock.config, "LlamaConfig"),
    "list": (lambda x: [x.stock], "list"),
    "weights": (lambda x: x.stock.state_dict(), "OrderedDict"),
    "tokenizer": (lambda x: x.tokenizer, "Tokenizer"),
}
TAKE_A_MODULE = {
    "enable": (enable_bidirectional, UnsupportedModelError),
    "disable": (disable_bidirectional, UnsupportedModelError),
    "is-bidirectional": (is_bidirectional, UnsupportedModelError),
    "block": (enter, UnsupportedModelError),
    "causal-block": (lambda model: enter(model, enabled=False), UnsupportedModelError),
    "report": (attention_report, UnsupportedModelError),
    "assert": (assert_bidirectional, UnsupportedModelError),
    "head": (apply_mntp_head, HeadError),
    "remove-head": (remove_mntp_head, HeadError),
}


def of_no_module(verb, thing):
    call, error = TAKE_A_MODULE[verb]
    make, word = NO_MODULES[thing]
    return Row(f"{verb}-of-{thing}", lambda x: call(make(x)), error, word)


FORWARD = [
    mask("list", lambda: [[1] * N], "list"),
    mask("tuple", lambda: (1,) * N, "tuple"),
    mask("numpy", lambda: np.ones((1, N)), "ndarray"),
    mask("str", lambda: "ones", "str"),
    mask("int", lambda: 1, "int"),
    mask("true", lambda: True, "bool"),
    mask("0d", lambda: torch.tensor(1), "()"),
    mask("1d", lambda: torch.ones(N), "(9,)"),
    mask("empty", lambda: torch.ones(0), "(0,)"),
    mask("2d-too-short", lambda: torch.ones(1, 8), "(1, 8)"),
    mask("2d-too-long", lambda: torch.ones(1, 10), "(1, 10)"),
    mask("2d-of-two-rows", lambda: torch.ones(2, N), "(2, 9)"),
    mask("2d-transposed", lambda: torch.ones(N, 1), "(9, 1)"),
    mask("3d", lambda: torch.ones(1, N, N), "(1, 9, 9)"),
    mask("5d", lambda: torch.ones(1, 1, 1, N, N), "(1, 1, 1, 9, 9)"),
    mask("numbers-of-sequences", lambda: torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]]), "position_ids"),
    mask("minus-one", lambda: -torch.ones(1, N, dtype=torch.int64), "other values"),
    mask("half", lambda: ONES / 2, "other values"),
    mask("additive-2d", lambda: torch.where(ONES == 1, -1e9, 0.0), "additive"),
    mask("nan-2d", lambda: ONES * torch.nan, "other values"),
    mask("inf-2d", lambda: ONES * torch.inf, "other values"),
    mask("complex-2d", lambda: ONES.to(torch.complex64), "complex64"),
    mask("sparse", lambda: ONES.to_sparse(), "dense"),
    mask("nested", lambda: torch.nested.nested_tensor([torch.ones(N)]), "dense"),
    mask("on-meta", lambda: ONES.to("meta"), "meta"),
    mask("4d-int", lambda: torch.ones(1, 1, N, N, dtype=torch.int64), "int64"),
    mask("4d-complex", lambda: DENSE.to(torch.complex64), "complex64"),
    mask("4d-sparse", lambda: DENSE.to_sparse(), "dense"),
    mask("4d-of-two-rows", lambda: torch.zeros(2, 1, N, N), "(2, 1, 9, 9)"),
    mask("4d-three-heads", lambda: torch.zeros(1, 3, N, N), "(1, 3, 9, 9)"),
    mask("4d-few-queries", lambda: torch.zeros(1, 1, 5, N), "(1, 1, 5, 9)"),
    mask("4d-few-keys", lambda: torch.zeros(1, 1, N, 5), "(1, 1, 9, 5)"),
    mask("4d-one-key", lambda: torch.zeros(1, 1, N, 1), "(1, 1, 9, 1)"),
    mask("4d-nan", lambda: DENSE * torch.nan, "NaN"),
    mask("4d-inf", lambda: DENSE + torch.inf, "+inf"),
    mask("dict-of-one", lambda: with_dict("full_attention", value=DENSE), "full_attention"),
    mask("dict-empty", dict, "nothing"),
    forward("mask-of-one-row-for-two", lambda x: x.model(TWO, attention_mask=ONES), AttentionMaskError, "(2, 9)"),
    forward("mask-by-place", lambda x: x.model(IDS, [[1] * N]), AttentionMaskError, "list"),
    forward("mask-through-the-head", lambda x: x.head(IDS, [[1] * N], labels=LABELS), AttentionMaskError, "list"),
    forward("mask-through-the-lm", lambda x: x.lm(IDS, attention_mask="1"), AttentionMaskError, "str"),
    positions("list", lambda: [list(range(N))], "list"),
    positions("range", lambda: range(N), "range"),
    positions("numpy", lambda: np.arange(N)[None], "ndarray"),
    positions("str", lambda: "0 1 2", "str"),
    positions("int", lambda: 3, "int"),
    positions("float", lambda: POSITIONS.float(), "float32"),
    positions("bool", lambda: POSITIONS.bool(), "torch.bool"),
    positions("complex", lambda: POSITIONS.to(torch.complex64), "complex64"),
    positions("0d", lambda: torch.tensor(0), "()"),
    positions("1d-too-short", lambda: torch.arange(5), "(5,)"),
    positions("2d-too-short", lambda: torch.arange(5)[None], "(1, 5)"),
    positions("2d-too-many-rows", lambda: POSITIONS.expand(3, N), "(3, 9)"),
    positions("2d-transposed", lambda: POSITIONS.mT, "(9, 1)"),
    positions("4d", lambda: POSITIONS[None, None], "(1, 1, 1, 9)"),
    positions("four-kinds-too-short", lambda: torch.arange(5).expand(4, 1, 5), "(4, 1, 5)"),
    forward(
        "positions-list-beside-4d-mask",
        lambda x: x.model(IDS, attention_mask=DENSE, position_ids=POSITIONS.tolist()),
        AttentionMaskError,
        "list",
    ),
    forward(
        "positions-float-beside-4d-mask",
        lambda x: x.model(IDS, attention_mask=DENSE, position_ids=POSITIONS.float()),
        AttentionMaskError,
        "float32",
    ),
    forward(
        "positions-too-short-beside-4d-mask",
        lambda x: x.model(IDS, attention_mask=DENSE, position_ids=POSITIONS[:, :8]),
        AttentionMaskError,
        "(1, 8)",
    ),
    forward(
        "positions-str-beside-cu-seq-lens",
        lambda x: x.model(IDS, position_ids="0", cu_seq_lens_q=SEQUENCES),
        AttentionMaskError,
        "position_ids",
    ),
    sequences("list", lambda: [0, 4, N], "list"),
    sequences("tuple", lambda: (0, 4, N), "tuple"),
    sequences("numpy", lambda: np.array([0, 4, N]), "ndarray"),
    sequences("str", lambda: "0 4 9", "str"),
    sequences("int", lambda: N, "int"),
    sequences("float", lambda: SEQUENCES.float(), "float32"),
    sequences("bool", lambda: SEQUENCES.bool(), "torch.bool"),
    sequences("complex", lambda: SEQUENCES.to(torch.complex64), "complex64"),
    sequences("0d", lambda: torch.tensor(N), "()"),
    sequences("2d", lambda: SEQUENCES[None], "(1, 3)"),
    sequences("empty", lambda: SEQUENCES[:0], "[]"),
    sequences("one", lambda: boundaries(0), "[0]"),
    sequences("falling", lambda: boundaries(0, 5, 4, N), "rise"),
    sequences("empty-sequence", lambda: boundaries(0, 4, 4, N), "rise"),
    sequences("not-from-0", lambda: boundaries(1, 4, N), "from 0"),
    sequences("below-0", lambda: boundaries(-1, 4, N), "from 0"),
    sequences("not-to-length", lambda: boundaries(0, 4, 8), "to 9"),
    sequences("past-length", lambda: boundaries(0, 4, 12), "to 9"),
    forward("cu-seq-lens-of-two-rows", lambda x: x.model(TWO, cu_seq_lens_q=SEQUENCES), AttentionMaskError, "one row"),
    forward(
        "cu-seq-lens-k-alone", lambda x: x.model(IDS, cu_seq_lens_k=SEQUENCES), AttentionMaskError, "cu_seq_lens_k"
    ),
    forward(
        "cu-seq-lens-k-others",
        lambda x: x.model(IDS, cu_seq_lens_q=SEQUENCES, cu_seq_lens_k=boundaries(0, 5, N)),
        AttentionMaskError,
        "[0, 5, 9]",
    ),
    forward(
        "cu-seq-lens-k-list",
        lambda x: x.model(IDS, cu_seq_lens_q=SEQUENCES, cu_seq_lens_k=[0, 4, N]),
        AttentionMaskError,
        "list",
    ),
    forward(
        "cu-seq-lens-bad-beside-4d-mask",
        lambda x: x.model(IDS, attention_mask=DENSE, cu_seq_lens_q=boundaries(0, 4)),
        AttentionMaskError,
        "to 9",
    ),
    forward("cache-empty", lambda x: x.model(IDS, past_key_values=()), CacheError, "tuple"),
    forward("cache", lambda x: x.model(IDS, past_key_values=transformers.DynamicCache()), CacheError, "DynamicCache"),
    forward("cache-str", lambda x: x.model(IDS, past_key_values="no"), CacheError, "Leave it out"),
    forward(
        "cache-by-the-lm", lambda x: x.lm(IDS, past_key_values=transformers.DynamicCache()), CacheError, "DynamicCache"
    ),
    forward("ids-0d", lambda x: x.model(IDS[0, 0]), ArgumentError, "input_ids of shape ()"),
    forward("ids-1d", lambda x: x.model(IDS[0]), ArgumentError, "(9,)"),
    forward("ids-1d-by-the-lm", lambda x: x.lm(IDS[0], attention_mask=ONES[0]), ArgumentError, "[None]"),
    forward("embeds-2d", lambda x: x.model(inputs_embeds=EMBEDS[0]), ArgumentError, "(9, 32)"),
    forward("embeds-1d", lambda x: x.model(inputs_embeds=EMBEDS[0, 0]), ArgumentError, "width"),
    forward("too-many-arguments", lambda x: x.model(IDS, *[None] * 40), ArgumentError, "41"),
    forward("ids-twice", lambda x: x.model(IDS, input_ids=IDS), ArgumentError, "input_ids"),
    forward("mask-twice", lambda x: x.model(IDS, ONES, attention_mask=ONES), ArgumentError, "attention_mask"),
    forward("head-too-many-arguments", lambda x: x.head(IDS, *[None] * 40), ArgumentError, "41"),
    forward("head-ids-twice", lambda x: x.head(IDS, input_ids=IDS), ArgumentError, "input_ids"),
    labels("list", lambda: LABELS.tolist(), "list"),
    labels("numpy", lambda: LABELS.numpy(), "ndarray"),
    labels("str", lambda: "w1", "str"),
    labels("int", lambda: 5, "int"),
    labels("true", lambda: True, "bool"),
    labels("float", lambda: LABELS.float(), "float32"),
    labels("bool", lambda: LABELS.bool(), "torch.bool"),
    labels("complex", lambda: LABELS.to(torch.complex64), "complex64"),
    labels("on-meta", lambda: LABELS.to("meta"), "meta"),
    labels("0d", lambda: torch.tensor(5), "()"),
    labels("1d", lambda: LABELS[0], "(9,)"),
    labels("3d", lambda: LABELS[..., None], "(1, 9, 1)"),
    labels("too-short", lambda: LABELS[:, :5], "(1, 5)"),
    labels("of-two-rows", lambda: LABELS.expand(2, N), "(2, 9)"),
    labels("past-the-vocabulary", lambda: LABELS + 100, f"below {SIZES['vocab_size']}"),
    labels("minus-one", lambda: torch.full_like(LABELS, -1), "-1"),
    loss("logits-to-keep", "leave it out", logits_to_keep=4),
    loss("num-logits-to-keep", "leave it out", num_logits_to_keep=4),
    loss("logits-to-keep-tensor", "leave it out", logits_to_keep=torch.tensor([1])),
    loss("ignore-index-none", "None", ignore_index=None),
    loss("ignore-index-str", "'-100'", ignore_index="-100"),
    loss("ignore-index-list", "integer", ignore_index=[-100]),
    loss("ignore-index-float", "-99.5", ignore_index=-99.5),
    loss("items-str", "'3'", num_items_in_batch="3"),
    loss("items-list", "[3]", num_items_in_batch=[3]),
    loss("items-negative", "-3", num_items_in_batch=-3),
    loss("items-nan", "nan", num_items_in_batch=float("nan")),
    loss("items-two", "tensor([1, 2])", num_items_in_batch=torch.tensor([1, 2])),
    loss("skip-logits-str", "'no'", skip_logits="no"),
    loss("skip-logits-int", "True, False or None", skip_logits=2),
    forward("generate", lambda x: x.lm.generate(IDS, max_new_tokens=2), GenerateError, "enabled=False"),
    forward("generate-with-head", lambda x: x.head.generate(IDS, max_new_tokens=2), GenerateError, "generate"),
]
if hasattr(GenerationMixin, "generate_batch"):
    FORWARD.append(forward("generate-batch", lambda x: x.lm.generate_batch([TEXT]), GenerateError, "generate_batch"))
if not transformers.__version__.startswith(("4.39", "4.40", "4.41")):  # there, ones and zeros were the only 4D form
    FORWARD.append(mask("4d-ones-and-zeros", lambda: torch.eye(N)[None, None], "ones and zeros"))

OTHERS = [
    *(of_no_module(verb, thing) for verb in TAKE_A_MODULE for thing in NO_MODULES),
    Row("enable-linear", lambda x: enable_bidirectional(x.linear), UnsupportedModelError, "Linear"),
    Row("disable-linear", lambda x: disable_bidirectional(x.linear), UnsupportedModelError, "Linear"),
    Row("block-linear", lambda x: enter(x.linear), UnsupportedModelError, "Linear"),
    Row("report-linear", lambda x: attention_report(x.linear), UnsupportedModelError, "Linear"),
    Row("head-linear", lambda x: apply_mntp_head(x.linear), HeadError, "*ForCausalLM"),
    Row("enable-encoder", lambda x: enable_bidirectional(x.bert), UnsupportedModelError, "Bert"),
    Row("block-encoder", lambda x: enter(x.bert), UnsupportedModelError, "encoder"),
    Row("head-encoder", lambda x: apply_mntp_head(x.bert), HeadError, "Bert"),
    Row("enable-recurrent", lambda x: enable_bidirectional(x.mamba), UnsupportedModelError, "Mamba"),
    Row("block-recurrent", lambda x: enter(x.mamba), UnsupportedModelError, "Mamba"),
    Row("head-recurrent", lambda x: apply_mntp_head(x.mamba), UnsupportedModelError, "Mamba"),
    Row("head-classifier", lambda x: apply_mntp_head(x.classifier), HeadError, "LlamaForSequenceClassification"),
    Row("head-of-a-list", lambda x: apply_mntp_head(torch.nn.ModuleList([x.bare])), HeadError, "ModuleList"),
    Row("head-several", lambda x: apply_mntp_head(x.two_heads), HeadError, "output heads"),
    Row("head-logits-str", lambda x: apply_mntp_head(x.stock, eval_logits="all"), HeadError, "'all'"),
    Row("head-logits-none", lambda x: apply_mntp_head(x.stock, eval_logits=None), HeadError, "None"),
    Row("head-logits-list", lambda x: apply_mntp_head(x.stock, eval_logits=["full"]), HeadError, "['full']"),
    Row("head-logits-again", lambda x: apply_mntp_head(x.head, eval_logits="Full"), HeadError, "'Full'"),
    Row("block-twice", lambda x: enter_twice(x.stock), OrderError, "entered already"),
    Row("block-twice-when-on", lambda x: enter_twice(x.lm), OrderError, "anew"),
    Row("report-length-0", lambda x: attention_report(x.stock, length=0), ConfigError, "3"),
    Row("report-length-2", lambda x: attention_report(x.stock, length=2), ConfigError, "2"),
    Row("report-length-129", lambda x: attention_report(x.stock, length=129), ConfigError, "128"),
    Row("report-length-str", lambda x: attention_report(x.stock, length="7"), ConfigError, "'7'"),
    Row("report-length-float", lambda x: attention_report(x.stock, length=7.0), ConfigError, "7.0"),
    Row("report-length-true", lambda x: attention_report(x.stock, length=True), ConfigError, "True"),
    Row("assert-length-1", lambda x: assert_bidirectional(x.lm, length=1), ConfigError, "integer"),
    Row("assert-length-list", lambda x: assert_bidirectional(x.lm, length=[7]), ConfigError, "[7]"),
    Row("assert-causal", lambda x: assert_bidirectional(x.stock), StillCausalError, "2 causal"),
    Row("report-on-meta", lambda x: attention_report(x.on_meta), UnsupportedModelError, "meta"),
    Row("compare-with-none", lambda x: x.report.unlike_mirror_of(None), ArgumentError, "NoneType"),
    Row("compare-with-model", lambda x: x.report.unlike_mirror_of(x.stock), ArgumentError, "LlamaForCausalLM"),
    Row("narrower-than-str", lambda x: x.report.narrower_than("causal"), ArgumentError, "str"),
    Row("compare-lengths", lambda x: x.report.unlike_mirror_of(x.longer_report), ConfigError, "length 5"),
    Row("release-old", lambda x: supported_architectures("0.1"), ConfigError, "0.1"),
    Row("release-empty", lambda x: supported_architectures(""), ConfigError, "for each of"),
    Row("release-word", lambda x: supported_architectures("newest"), ConfigError, "newest"),
    Row("release-short", lambda x: supported_architectures("5.2"), ConfigError, "5.2.0"),
    Row("release-float", lambda x: supported_architectures(5.2), ConfigError, "5.2"),
    Row("release-list", lambda x: supported_architectures(["5.2.0"]), ConfigError, "['5.2.0']"),
    Row("release-dict", lambda x: supported_architectures({}), ConfigError, "{}"),
    Row("collator-of-none", lambda x: MNTPCollator(None), CollatorError, "NoneType"),
    Row("collator-of-name", lambda x: MNTPCollator("gpt2"), CollatorError, "'gpt2'"),
    Row("collator-of-class", lambda x: MNTPCollator(type(x.tokenizer)), CollatorError, "class"),
    Row("collator-of-model", lambda x: MNTPCollator(x.stock), CollatorError, "LlamaForCausalLM"),
    Row("collator-of-vocabulary", lambda x: MNTPCollator(x.tokenizer.get_vocab()), CollatorError, "dict"),
    Row("collator-of-backend", lambda x: MNTPCollator(x.tokenizer.backend_tokenizer), CollatorError, "Tokenizer"),
    *(
        setting(f"{name}-{number}", repr(value), **{name: value})
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob")
        for number, value in enumerate((-0.1, 1.1, 15, "0.2", None, True, float("nan"), [0.2], 1j))
    ),
    setting("share-tensor", "tensor", mlm_probability=torch.tensor(0.2)),
    setting("share-0", "above 0", mlm_probability=0),
    setting("shares-above-1", "0.8 + 0.3", mask_replace_prob=0.8, random_replace_prob=0.3),
    *(
        setting(f"pad-to-{number}", repr(value), pad_to_multiple_of=value)
        for number, value in enumerate((0, -8, 1.5, "8", True, [8], 10**30))
    ),
    setting("pad-too-long", str(2**24), pad_to_multiple_of=2**24 + 1),
    *(setting(f"seed-{number}", repr(value), seed=value) for number, value in enumerate((-1, 1.5, "8", True, [8]))),
    *(
        setting(f"{name}-{number}", repr(value), **{"padding_free": True, "seed": 1, name: value})
        for name in ("padding_free", "return_flash_attn_kwargs", "repeatable")
        for number, value in enumerate(("no", 1, None))
    ),
    setting("padding-free-and-padded", "padding_free", padding_free=True, pad_to_multiple_of=8),
    setting("boundaries-of-padded", "padding_free=True", return_flash_attn_kwargs=True),
    setting("repeatable-without-seed", "seed", repeatable=True),
    *(
        Row(f"mask-token-{name}", lambda x, v=value: MNTPCollator(x.tokenizer, mask_token=v), MaskTokenError, word)
        for name, value, word in (
            ("unknown", "<x>", "'<x>'"),
            ("empty", "", "non-empty"),
            ("space", "  ", "vocabulary"),
            ("two-words", "w1 w2", "2 ([5, 6])"),
            ("id", 3, "3"),
            ("bytes", b"_", "b'_'"),
            ("list", ["_"], "['_']"),
            ("true", True, "True"),
        )
    ),
    Row("features-none", lambda x: x.collator(None), CollatorError, "None"),
    Row("features-int", lambda x: x.collator(3), CollatorError, "list"),
    Row("features-str", lambda x: x.collator("w1 w2"), CollatorError, "str"),
    Row("features-bytes", lambda x: x.collator(b"w1"), CollatorError, "bytes"),
    Row("features-dict", lambda x: x.collator({"input_ids": [TEXT]}), CollatorError, "dict"),
    Row("features-encoding", lambda x: x.collator(x.tokenizer(["w1"])), CollatorError, "BatchEncoding"),
    Row("features-0d", lambda x: x.collator(torch.tensor(3)), CollatorError, "tensor(3)"),
    Row("features-1d", lambda x: x.collator(torch.tensor(TEXT)), CollatorError, "shape ()"),
    Row("features-empty", lambda x: x.collator([]), CollatorError, "nothing"),
    Row("features-no-token", lambda x: x.collator([{"input_ids": []}]), CollatorError, "no token"),
    feature("none", None, "Feature 1"),
    feature("str", "w1 w2", "feature 1"),
    feature("object", object(), "object"),
    feature("text", {"text": "w1"}, "Tokenize"),
    feature("ids-none", {"input_ids": None}, "no input_ids"),
    feature("ids-str", {"input_ids": "w1"}, "integers"),
    feature("ids-2d", {"input_ids": [TEXT]}, "(1, 3)"),
    feature("ids-ragged", {"input_ids": [[5], [6, 7]]}, "feature 1"),
    feature("ids-float", {"input_ids": [5.0, 6.0]}, "float64"),
    feature("ids-nan", {"input_ids": [float("nan")]}, "float64"),
    feature("ids-bool", {"input_ids": [True, False]}, "bool"),
    feature("ids-complex", {"input_ids": [1j]}, "complex128"),
    feature("ids-negative", {"input_ids": [5, -1]}, "-1"),
    feature("ids-of-another-tokenizer", {"input_ids": [5, 10**6]}, "1000000"),
    feature("ids-huge", {"input_ids": [5, 10**30]}, "object"),
    feature("ids-uint64", {"input_ids": np.array([5, 2**63], dtype=np.uint64)}, "int64"),
    feature("ids-on-meta", torch.tensor(TEXT).to("meta"), "meta"),
    feature("ids-sparse", torch.tensor(TEXT).to_sparse(), "Sparse"),
    feature("ids-set", {5, 6}, "object"),
    feature("mask-short", {"input_ids": TEXT, "attention_mask": [1]}, "attention_mask"),
    feature("mask-long", {"input_ids": TEXT, "attention_mask": [1] * 5}, "5"),
    feature("mask-float", {"input_ids": TEXT, "attention_mask": [1.0] * 3}, "float64"),
    feature("mask-str", {"input_ids": TEXT, "attention_mask": "111"}, "integers"),
    feature("mask-of-sequences", {"input_ids": TEXT, "attention_mask": [1, 2, 2]}, "position_ids"),
    feature("mask-negative", {"input_ids": TEXT, "attention_mask": [1, -1, 1]}, "-1 to 1"),
    feature("specials-short", {"input_ids": TEXT, "special_tokens_mask": [1]}, "special_tokens_mask"),
    feature("specials-float", {"input_ids": TEXT, "special_tokens_mask": [0.5] * 3}, "float64"),
    feature("specials-ids", {"input_ids": TEXT, "special_tokens_mask": [7, 0, 0]}, "0 to 7"),
    feature("positions-short", {"input_ids": TEXT, "position_ids": [0, 1]}, "position_ids"),
    feature("positions-float", {"input_ids": TEXT, "position_ids": [0.0, 1.0, 2.0]}, "float64"),
    feature("positions-bool", {"input_ids": TEXT, "position_ids": [True] * 3}, "bool"),
    Row("metrics-of-none", lambda x: mntp_metrics(None), HeadError, "NoneType"),
    Row("metrics-of-array", lambda x: mntp_metrics(np.ones((1, 3))), HeadError, "EvalPrediction"),
    Row("metrics-of-nothing", lambda x: mntp_metrics(prediction((), np.ones((1, 3)))), HeadError, "(0,)"),
    Row("metrics-without-labels", lambda x: mntp_metrics(prediction(np.ones((1, 3)), None)), HeadError, "(1, 3)"),
    Row(
        "metrics-of-two-lengths",
        lambda x: mntp_metrics(prediction(np.ones((1, 3)), np.ones((1, 4)))),
        HeadError,
        "(1, 4)",
    ),
]
TABLE = [(row, backend) for row in FORWARD for backend in ("eager", "sdpa")] + [(row, "sdpa") for row in OTHERS]


def prediction(predictions, label_ids):
    return transformers.EvalPrediction(predictions=predictions, label_ids=label_ids)


def encoder():
    sizes = dict(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


def recurrent():
    config = transformers.MambaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


MAKE = {
    "bare": llama,
    "stock": causal_lm,
    "model": lambda **settings: enable_bidirectional(llama(**settings)),
    "lm": lambda **settings: enable_bidirectional(causal_lm(**settings)),
    "head": lambda **settings: apply_mntp_head(causal_lm(**settings)),
    "two_heads": lambda **settings: without_head(causal_lm(**settings)),
    "classifier": lambda **settings: llama(LlamaForSequenceClassification, pad_token_id=0, **settings),
    "on_meta": lambda **settings: causal_lm(**settings).to("meta"),
    "linear": lambda **settings: torch.nn.Linear(2, 2),
    "bert": lambda **settings: encoder(),
    "mamba": lambda **settings: recurrent(),
}
DO_NOT_RUN = ("on_meta", "two_heads")


def told(name, model):
    """All that is compared of a model: what it is, its weights, whether it is bidirectional, and what it computes."""
    if not isinstance(model, transformers.PreTrainedModel):
        return str(model), list(model.state_dict().values())
    outputs = []
    if name not in DO_NOT_RUN:
        with torch.no_grad():
            outputs = [model(input_ids=ids)[0] for ids in (IDS, TWO)]
    weights = [] if name == "on_meta" else [*model.state_dict().values(), *model.buffers()]
    return (described(model), is_bidirectional(model)), [*weights, *outputs]


def assert_same(now, before, what):
    assert now[0] == before[0], what
    assert len(now[1]) == len(before[1]), what
    assert all(torch.equal(a, b) for a, b in zip(now[1], before[1], strict=True)), what


class Things:
    """What a row may use, a fresh copy each. Models are built once per module and backend."""

    originals: dict[tuple[str, str], Any] = {}

    def __init__(self, backend):
        self.backend, self.used = backend, {}
        self.tokenizer = make_tokenizer()
        self.collator = MNTPCollator(self.tokenizer, seed=1, repeatable=True)

    def __getattr__(self, name):
        if name not in MAKE:
            raise AttributeError(name)
        if name not in self.used:
            key = name, self.backend
            if key not in self.originals:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    model = MAKE[name](backend=self.backend)
                self.originals[key] = model, told(name, copy.deepcopy(model))
            self.used[name] = copy.deepcopy(self.originals[key][0])
        return self.used[name]

    @property
    def report(self):
        return self._report(7)

    @property
    def longer_report(self):
        return self._report(5)

    def _report(self, length):
        key = f"report of {length}", self.backend
        if key not in self.originals:
            self.originals[key] = attention_report(self.stock, length=length)
        return self.originals[key]

    def told(self):
        """All that is compared besides the models."""
        random = torch.get_rng_state().numpy().tobytes()
        settings = {key: value for key, value in vars(self.collator).items() if isinstance(value, (int, float, str))}
        texts = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
        batch = {key: value.tolist() for key, value in self.collator(texts).items()}
        return random, torch.is_grad_enabled(), tokens_of(self.tokenizer), settings, batch

    def assert_unchanged(self, before):
        assert self.told() == before
        for name, model in self.used.items():
            assert_same(told(name, model), self.originals[name, self.backend][1], name)


def tokens_of(tokenizer):
    return len(tokenizer), tokenizer.padding_side, tokenizer.special_tokens_map, tokenizer.get_vocab()


@pytest.fixture(scope="module", autouse=True)
def models_go_after_the_module():
    yield
    Things.originals.clear()


@pytest.mark.parametrize("row, backend", [pytest.param(*case, id=f"{case[0].id}-{case[1]}") for case in TABLE])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Casting complex values")
def test_bad_input_is_refused_and_nothing_is_changed(row, backend):
    x = Things(backend)
    before = x.told()
    with pytest.raises(BidirectPatchError) as caught:
        row.call(x)
    x.assert_unchanged(before)
    error = caught.value
    assert type(error) is row.error, f"{type(error).__name__}: {error}"
    assert isinstance(error, BUILTIN[row.error])
    assert row.word in str(error), str(error)
