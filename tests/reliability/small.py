"""Models of a few thousand weights, and the question that every test here asks: which outputs does one token move?"""

import copy

import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

TRANSFORMERS = Version(transformers.__version__)
IDS = torch.arange(5, 14)[None]
ONES = torch.ones_like(IDS)
PADDED = ONES.clone()
PADDED[0, 7:] = 0
CAUSAL, BOTH = "000000001", "111111111"
ONE_SINK, TWO_SINKS = "011111111", "001111111"  # what the last token moves beside sink tokens
SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def llama(cls=LlamaModel, backend="sdpa", **settings):
    """A small random Llama in eval mode."""
    config = LlamaConfig(**{**SIZES, **settings})
    return cls._from_config(config, attn_implementation=backend).eval()


def causal_lm(**settings):
    """The same with an output head."""
    return llama(LlamaForCausalLM, **settings)


def output(model, ids=IDS, **kwargs):
    """The first output of a model, (batch, length, width)."""
    with torch.no_grad():
        return model(input_ids=ids, **kwargs)[0]


def moves(model, at=-1, ids=IDS, **kwargs):
    """A digit per position: 1 where the output moves if the token at `at` is another one."""
    other = ids.clone()
    other[0, at] = 40
    moved = (output(model, ids, **kwargs).float() - output(model, other, **kwargs).float()).abs().amax(-1)[0] > 1e-7
    return "".join(str(int(m)) for m in moved)


def moves_real(model, **kwargs):
    """Which real positions of a padded row the last real token moves."""
    return moves(model, at=6, attention_mask=PADDED, **kwargs)[:7]


def leftovers(model):
    """Names of attributes that the patch has left on a module of `model`."""
    return [name for module in model.modules() for name in vars(module) if "bidirect" in name]


def described(model):
    """Class, attribute names, plain attributes, hooks and buffers of every module, and the config."""

    def plain(value):
        return value if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) else type(value).__name__

    modules = {
        name: (type(m), {k: plain(v) for k, v in vars(m).items()}, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    return modules, model.config.to_json_string()


def assert_twins(model, twin):
    """`model` is what `twin`, which was never patched, is: bit for bit."""
    mine, other = copy.deepcopy(described(model)), described(twin)
    assert mine[0].keys() == other[0].keys()
    for name, (cls, attributes, *hooks) in mine[0].items():
        theirs = other[0][name][1]
        differ = {k: (attributes.get(k), theirs.get(k)) for k in attributes.keys() | theirs.keys()}
        differ = {k: pair for k, pair in differ.items() if pair[0] != pair[1]}
        assert not differ, f"attributes of {name!r}, the model's and its twin's: {differ}"
        assert (cls, *hooks) == (other[0][name][0], *other[0][name][2:]), name
    assert mine[1] == other[1]
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(output(model), output(twin))
