"""A stand-in for FlashAttention 2, 3 and 4 that computes exact attention on any device and records how it was called.

FlashAttention needs a GPU and a compiler for it; what our tests ask is which tokens its functions were told to look at.
So the doubles compute the attention that those functions document (dense and varlen, causal flag, window, soft-cap,
grouped heads), reject the arguments that the kernels reject, are differentiable, and note each call. One liberty:
float32 is taken too, so that backends can be compared closely. Dropout must be 0.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import sys
from dataclasses import dataclass
from types import ModuleType

import torch

VERSIONS = {2: ("flash-attn", "2.6.3"), 3: ("flash-attn-3", "3.0.0"), 4: ("flash-attn-4", "4.0.0")}
MODELS = ("llama", "mistral", "gemma", "qwen2")


@dataclass
class Call:
    """One call of a double: which function, its flags, and the documents it was given (None if dense)."""

    function: str
    causal: bool
    window_size: tuple
    softcap: float
    cu_seqlens: list | None
    shape: tuple


def attend(query, key, value, scale=None, causal=False, window_size=(-1, -1), softcap=0.0, sink=None, ends=None):
    """Exact attention: (..., q, heads, dim) over (..., k, kv_heads, dim), aligned at their last tokens.

    sink: (heads,), a logit beside the keys' whose share of the softmax goes nowhere.
    ends: where the documents of the queries end, and those of the keys, as `cu_seqlens` says it; each row is one if None.
    """
    groups, rest = divmod(query.shape[-2], key.shape[-2])
    if rest or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"flash_attn: shapes don't fit: {query.shape}, {key.shape}, {value.shape}")
    q, k, v = (x.float().transpose(-3, -2) for x in (query, key, value))  # (..., heads, tokens, dim)
    k, v = (x.repeat_interleave(groups, dim=-3) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if ends is None:
        ends = [torch.tensor([0, x.shape[-2]], device=x.device) for x in (q, k)]
    (mine, i), (others, j) = map(_places, ends)
    mine, i = mine[:, None], i[:, None]
    left, right = (-1 if side is None else side for side in window_size)
    hidden = mine != others
    if left >= 0:
        hidden |= j < i - left
    if causal or right >= 0:
        hidden |= j > i + (0 if causal else right)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.float()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[-2]].nan_to_num()  # a row that sees nothing gives zeros
    return (weights @ v).transpose(-3, -2).to(query.dtype)


def _places(ends):
    """Of each token, its document, and where it stands in that, counted from the end."""
    document = torch.repeat_interleave(ends.diff())
    return document, torch.arange(len(document), device=ends.device) - ends[1:][document]


def index_first_axis(x, indices):
    """The rows of x, (total, ...), at these indices."""
    return x[indices]


def pad_input(x, indices, batch, seqlen):
    """(tokens, ...) back to (batch, seqlen, ...), zeros where no token was."""
    padded = x.new_zeros(batch * seqlen, *x.shape[1:])
    return padded.index_put((indices.long(),), x).view(batch, seqlen, *x.shape[1:])


def unpad_input(x, attention_mask, *_):
    """The real tokens of (batch, seqlen, ...), with their indices, cumulative lengths and longest length."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, ends, int(lengths.max())


_calls = []  # of the double that was made last


def _yes(*_, **__):
    return True


def _no(*_, **__):
    return False


# The signatures follow the packages', because transformers inspects them to see what each version supports.
@functools.cache
def _functions(version):
    """`flash_attn_func` and `flash_attn_varlen_func`: always the same two, so that what was seen of a class with them is kept."""

    def check_dropout(p):
        if p:
            raise RuntimeError("the FlashAttention double computes no dropout")

    if version == 2:

        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                            softcap=0.0, deterministic=False):  # fmt: skip
            check_dropout(dropout_p)
            return _dense(q, k, v, softmax_scale, causal, window_size, softcap)

        def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                                   softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                   deterministic=False):  # fmt: skip
            check_dropout(dropout_p)
            ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
            return _varlen(q, k, v, ends, longest, softmax_scale, causal, window_size, softcap)

    elif version == 3:  # no dropout from here on

        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                            deterministic=False):  # fmt: skip
            return _dense(q, k, v, softmax_scale, causal, window_size, softcap)

        def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None,
                                   softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                   deterministic=False):  # fmt: skip
            ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
            return _varlen(q, k, v, ends, longest, softmax_scale, causal, window_size, softcap)

    else:  # 4 has sinks and returns (out, lse)

        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None),
                            learnable_sink=None, softcap=0.0, deterministic=False):  # fmt: skip
            return _dense(q, k, v, softmax_scale, causal, window_size, softcap, learnable_sink), None

        def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                                   max_seqlen_k=None, softmax_scale=None, causal=False, window_size=(None, None),
                                   learnable_sink=None, softcap=0.0, deterministic=False):  # fmt: skip
            ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
            return _varlen(q, k, v, ends, longest, softmax_scale, causal, window_size, softcap, learnable_sink), None

    return flash_attn_func, flash_attn_varlen_func


def _dense(q, k, v, *how):
    if q.dim() != 4:
        raise RuntimeError(f"flash_attn_func takes (batch, tokens, heads, dim), got {tuple(q.shape)}")
    _note("flash_attn_func", q, None, *how)
    return attend(q, k, v, *how)


def _varlen(q, k, v, cu_seqlens, longest, *how):
    if q.dim() != 3:
        raise RuntimeError(f"flash_attn_varlen_func takes (tokens, heads, dim), got {tuple(q.shape)}")
    if len(cu_seqlens[0]) != len(cu_seqlens[1]):
        raise RuntimeError(f"cu_seqlens of {len(cu_seqlens[0])} and {len(cu_seqlens[1])} ends")
    for x, ends, most in zip((q, k), cu_seqlens, longest, strict=True):
        if ends.dtype != torch.int32:
            raise RuntimeError(f"cu_seqlens must be int32, got {ends.dtype}")
        ends = ends.tolist()
        if ends[0] != 0 or ends[-1] != len(x) or ends != sorted(ends):
            raise RuntimeError(f"cu_seqlens {ends} doesn't cover {len(x)} tokens")
        if most is not None and max(b - a for a, b in zip(ends, ends[1:])) > int(most):
            raise RuntimeError(f"max_seqlen {int(most)} is shorter than a document of {ends}")
    _note("flash_attn_varlen_func", q, ends, *how)
    return attend(q, k, v, *how, ends=cu_seqlens)


def _note(function, q, cu_seqlens, scale, causal, window_size, softcap, sink=None):
    _calls.append(Call(function, causal, tuple(window_size), softcap, cu_seqlens, tuple(q.shape)))


class FlashDouble:
    """The doubles and their record; `install(version)` makes transformers believe that this FlashAttention is there."""

    def __init__(self, monkeypatch):
        _calls.clear()
        self.calls = _calls
        self._patch = monkeypatch

    def install(self, version=2):
        """Make flash_attention_<version>, and no other, look installed until the test ends."""
        dense, varlen = _functions(version)
        self._packages(version, dense, varlen)
        importlib.import_module("transformers.modeling_utils")
        for name in MODELS:
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        for module in [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "transformers"]:
            self._bind(module, version, dense, varlen)

    def _packages(self, version, dense, varlen):
        """The importable packages with their metadata."""
        top = "flash_attn_interface" if version == 3 else "flash_attn"
        contents = {top: {}}
        if version == 2:
            contents[top] = {"__version__": VERSIONS[2][1]}
            contents["flash_attn.bert_padding"] = {f.__name__: f for f in (index_first_axis, pad_input, unpad_input)}
            contents["flash_attn.layers"] = {}
            contents["flash_attn.layers.rotary"] = {"apply_rotary_emb": None}
        home = contents.setdefault("flash_attn.cute", {}) if version == 4 else contents[top]
        home |= {"flash_attn_func": dense, "flash_attn_varlen_func": varlen}
        if version != 4:
            home["flash_attn_with_kvcache"] = lambda *_, **__: None  # imported by transformers, never called by us
        for name, content in contents.items():
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            vars(module).update(content)
            self._patch.setitem(sys.modules, name, module)
        self._patch.setattr(sys, "meta_path", [_Metadata(*VERSIONS[version], top), *sys.meta_path])

    def _bind(self, module, version, dense, varlen):
        """What importing transformers beside a real FlashAttention, on a machine with a GPU, would have bound."""
        names = vars(module)

        def put(**values):
            for name, value in values.items():
                self._patch.setattr(module, name, value, raising=False)

        for v in VERSIONS:
            if f"is_flash_attn_{v}_available" in names:
                put(**{f"is_flash_attn_{v}_available": _yes if v == version else _no})
            if v in names.get("FLASH_ATTENTION_COMPATIBILITY_MATRIX", {}):
                entry = names["FLASH_ATTENTION_COMPATIBILITY_MATRIX"][v]
                for check in ("general_availability_check", "pkg_availability_check"):
                    self._patch.setitem(entry, check, _yes if v == version else _no)
        for name in ("is_flash_attn_greater_or_equal", "is_flash_attn_greater_or_equal_2_10"):
            if name in names:
                put(**{name: _yes})
        if "_use_top_left_mask" in names:
            put(_use_top_left_mask=False)
        if "_get_unpad_data" in names:  # up to 4.53 they are bound at import: in each model's file in 4.39
            put(flash_attn_func=dense, flash_attn_varlen_func=varlen, _flash_supports_window_size=True)
            put(index_first_axis=index_first_axis)
            if version == 2:
                put(pad_input=pad_input, unpad_input=unpad_input)
            if "FA_VERSION" in names:
                put(FA_VERSION=version, flash_241=True)
                put(**{f"HAS_FA{v}": v == version for v in (2, 3)})
                put(**{f"flash_attn_{version}_func": dense, f"flash_attn_{version}_varlen_func": varlen})
                pads = (
                    (pad_input, unpad_input) if version == 2 else (names["_fa3_pad_input"], names["_fa3_unpad_input"])
                )
                put(**dict(zip((f"pad_input_fa{version}", f"unpad_input_fa{version}"), pads, strict=True)))
                put(pad_input=pads[0], unpad_input=pads[1])
        if ".models." in module.__name__ and any(n.startswith("is_flash_attn") for n in names):  # imported only then
            utils = sys.modules.get("transformers.modeling_flash_attention_utils")
            if utils and "_flash_attention_forward" not in names:
                put(_flash_attention_forward=utils._flash_attention_forward)
        for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn",
                     "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):  # fmt: skip
            if name in names:  # from 4.57 on they are looked up when the first model asks
                put(**{name: None})
        if "PreTrainedModel" in names and module.__name__ == "transformers.modeling_utils":
            self._allow(names["PreTrainedModel"])

    def _allow(self, base):
        """Skip the checks that a GPU is there, and keep the one that the model's class has this backend."""

        def check(cls):
            if not any(getattr(cls, f"_supports_flash_attn{version}", False) for version in ("", "_2", "_3")):
                raise ValueError(f"{cls.__name__} does not support FlashAttention")

        def enable(name):
            def check_and_enable(cls, config, *_, **__):
                check(cls)
                config._attn_implementation = name
                return config

            return classmethod(check_and_enable)

        def can_dispatch(self, *_, **__):
            check(type(self))
            return True

        for v in (2, 3):
            if hasattr(base, f"_check_and_enable_flash_attn_{v}"):
                self._patch.setattr(base, f"_check_and_enable_flash_attn_{v}", enable(f"flash_attention_{v}"))
        for name in ("_flash_attn_2_can_dispatch", "_flash_attn_3_can_dispatch", "_flash_attn_can_dispatch"):
            if hasattr(base, name):
                self._patch.setattr(base, name, can_dispatch)


class _Metadata(importlib.metadata.DistributionFinder):
    """Tells importlib.metadata that the double's distribution is installed."""

    def __init__(self, name, version, top_level):
        self.distribution = _Distribution(name, version, top_level)

    def find_spec(self, *_, **__):
        return None

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        wanted = context.name
        if wanted is None or wanted.replace("_", "-").lower() == self.distribution.metadata["Name"]:
            yield self.distribution


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name, version, top_level):
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "top_level.txt": top_level,
        }

    def read_text(self, filename):
        return self._files.get(filename)

    def locate_file(self, path):
        return path
