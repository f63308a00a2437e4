"""Whatever a user does to a model, in whatever order: the mode asked for is the mode in force, and the way back is exact.

A hypothesis state machine draws the orders. The mode and its sink tokens are seen by changing a token and watching what moves.
A twin of each model gets everything but the patch; at the end, the patch undone, the two are equal bit for bit.
"""

import copy
import io

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402

from bidirect_patch import (  # noqa: E402
    apply_mntp_head,
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
)
from bidirect_patch.errors import GenerateError  # noqa: E402
from bidirect_patch.mntp.head import remove_mntp_head  # noqa: E402

from .small import BOTH, CAUSAL, IDS, ONES, PADDED, assert_twins, causal_lm, moves  # noqa: E402

which = st.integers(0, 1)
NO_SINKS = (0, 0)
some_sinks = st.sampled_from([NO_SINKS, NO_SINKS, (1, 0), (2, 2)])  # tokens, and sinkless layers: none or all of the two


def enable_with(model, sinks):
    return enable_bidirectional(model, num_sink_tokens=sinks[0], num_sinkless_layers=sinks[1])


def bring_back(one):
    """Bring a model to the mode that it should have."""
    disable_bidirectional(one.model) if one.mode is False else enable_with(one.model, one.mode)


def moved_by_last(mode, text=BOTH):
    """What the last token of a text moves: `text` has a 1 for each of its tokens."""
    if mode is False:
        return CAUSAL
    begin = text.index("1")
    return text[:begin] + "0" * mode[0] + text[begin + mode[0] :]


def moved_by_first(mode):
    return BOTH if not mode or not mode[1] else "1" * mode[0] + "0" * (9 - mode[0])


class Patched:
    """One model, its twin, and what it should be."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = causal_lm(tie_word_embeddings=False)
        self.twin = copy.deepcopy(self.model)
        self.mode = False  # causal, or the sinks of a bidirectional model
        self.blocks = []  # (block, mode found)

    @property
    def both(self):
        """The model and its twin."""
        return self.model, self.twin


class Orders(RuleBasedStateMachine):
    """Two models, and all that can be done to them."""

    @initialize(compiles=st.sampled_from([2, 0, 0]))
    def build(self, compiles):
        self.all = [Patched(0), Patched(1)]
        self.compiles = compiles  # so often may a model be compiled, which takes seconds

    @invariant()
    def the_mode_asked_for_is_in_force(self):
        for one in getattr(self, "all", ()):
            assert is_bidirectional(one.model) == (one.mode is not False)
            assert moves(one.model) == moved_by_last(one.mode)
            assert moves(one.model, at=0) == moved_by_first(one.mode)

    @rule(i=which, sinks=some_sinks)
    def enable(self, i, sinks):
        one = self.all[i]
        assert enable_with(one.model, sinks) is one.model
        one.mode = sinks

    @rule(i=which)
    def disable(self, i):
        one = self.all[i]
        assert disable_bidirectional(one.model) is one.model
        one.mode = False

    @rule(i=which, mode=st.one_of(st.just(False), some_sinks))
    def enter(self, i, mode):
        one = self.all[i]
        if len(one.blocks) < 3:
            tokens, layers = mode or NO_SINKS
            block = bidirectional(one.model, mode is not False, num_sink_tokens=tokens, num_sinkless_layers=layers)
            block.__enter__()
            one.blocks.append((block, one.mode))
            one.mode = mode

    @rule(i=which, error=st.sampled_from([None, ValueError, KeyboardInterrupt]))
    def leave(self, i, error):
        one = self.all[i]
        if one.blocks:
            block, one.mode = one.blocks.pop()
            block.__exit__(error, error and error(), None)

    @rule(i=which, training=st.booleans())
    def train(self, i, training):
        for model in self.all[i].both:
            model.train(training)

    @rule(i=which, kind=st.sampled_from(["ones", "right", "left", "bool", "additive", "packed", "embeds"]))
    def forward(self, i, kind):
        one = self.all[i]
        given = {
            "ones": dict(attention_mask=ONES),
            "right": dict(attention_mask=PADDED),
            "left": dict(attention_mask=PADDED.flip(1)),
            "bool": dict(attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool)),
            "additive": dict(attention_mask=torch.zeros(1, 1, 9, 9, dtype=one.model.dtype)),
            "packed": dict(position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])),
            "embeds": {},
        }[kind]
        if kind in ("bool", "additive", "packed") and one.mode is False:
            return  # stock transformers' own business, which differs by release
        if kind == "embeds":
            one.model(inputs_embeds=one.model.get_input_embeddings()(IDS))
            return
        expected = {"right": BOTH, "left": "001111111", "packed": "000001111"}.get(kind, BOTH)
        if kind not in ("bool", "additive"):  # these say who sees whom
            expected = moved_by_last(one.mode, expected)
        at = 6 if kind == "right" else -1
        seen = moves(one.model, at, **given)
        real = [kind != "right" or p < 7 and True for p in range(9)]
        real = [r and (kind != "left" or p > 1) for p, r in enumerate(real)]
        if one.mode is not False:
            assert all(s == e for s, e, r in zip(seen, expected, real) if r), (kind, seen)
        else:
            assert all(s == str(int(p >= at % 9)) for p, (s, r) in enumerate(zip(seen, real)) if r), (kind, seen)

    @rule(i=which)
    def backward(self, i):
        one = self.all[i]
        one.model(input_ids=IDS)[0].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in one.model.model.parameters())
        one.model.zero_grad(set_to_none=True)

    @rule(i=which)
    def generate(self, i):
        one = self.all[i]
        if one.mode is not False:
            with pytest.raises(GenerateError):
                one.model.generate(IDS, max_new_tokens=2)
        elif not one.model.training:
            how = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
            assert torch.equal(one.model.generate(IDS, **how), one.twin.generate(IDS, **how))

    @precondition(lambda self: True)
    @rule(i=which)
    def deepcopy(self, i):
        one = self.all[i]
        if not one.blocks:
            one.model = copy.deepcopy(one.model)

    @rule(i=which)
    def pickle(self, i):
        one = self.all[i]
        if not one.blocks and not hasattr(one.twin, "_require_grads_hook"):  # a hook that stock can't pickle
            buffer = io.BytesIO()
            torch.save(one.model, buffer)
            buffer.seek(0)
            one.model = torch.load(buffer, weights_only=False)

    @rule(i=which)
    def load_state(self, i):
        one = self.all[i]
        one.model.load_state_dict(one.twin.state_dict())

    @rule(i=which, dtype=st.sampled_from([torch.float32, torch.float64]))
    def move(self, i, dtype):
        for model in self.all[i].both:
            model.to(dtype)

    @rule(i=which, on=st.booleans())
    def checkpointing(self, i, on):
        for model in self.all[i].both:
            if on:
                model.gradient_checkpointing_enable(dict(use_reentrant=False))
            else:
                model.gradient_checkpointing_disable()

    @rule(i=which, size=st.sampled_from([60, 64]))
    def resize(self, i, size):
        for model in self.all[i].both:
            torch.manual_seed(0)
            model.resize_token_embeddings(size)

    @rule(i=which, backend=st.sampled_from(["eager", "sdpa"]))
    def backend(self, i, backend):
        for model in self.all[i].both:
            if not hasattr(model, "set_attn_implementation"):
                return
            model.set_attn_implementation(backend)

    @rule(i=which, layer=which)
    def paste(self, i, layer):
        """A layer of the other model, in its mode; then the verbs bring the mixture to one state."""
        one, other = self.all[i], self.all[1 - i]
        if one.blocks or other.blocks:
            return
        pasted = copy.deepcopy(other.model.model.layers[layer]).to(one.model.dtype)
        backend = pasted.self_attn.config._attn_implementation
        if backend != one.model.config._attn_implementation or pasted.training != one.model.training:
            return
        one.model.model.layers[layer] = pasted
        one.twin.model.layers[layer] = copy.deepcopy(other.twin.model.layers[layer]).to(one.model.dtype)
        if (one.mode is False) != (other.mode is False):
            assert not is_bidirectional(one.model)
        bring_back(one)

    @rule(i=which)
    def share(self, i):
        """A layer that both models hold, and then each holds its own again."""
        one, other = self.all[i], self.all[1 - i]
        if one.blocks or other.blocks or one.model.dtype != other.model.dtype:
            return
        mine = one.model.model.layers[0]
        one.model.model.layers[0] = other.model.model.layers[0]
        enable_bidirectional(one.model)
        assert is_bidirectional(one.model)
        disable_bidirectional(one.model)
        assert not is_bidirectional(one.model)
        one.model.model.layers[0] = mine
        for each in (one, other):
            bring_back(each)

    @rule(i=which)
    def head(self, i):
        one = self.all[i]
        if one.blocks:
            return
        assert apply_mntp_head(one.model) is one.model
        one.mode = one.mode or NO_SINKS  # it keeps the sinks that it finds
        labels = IDS.clone()
        labels[0, :4] = -100
        hidden = IDS.clone()
        hidden[0, 4:] = 3
        assert one.model(input_ids=hidden, labels=labels).loss.isfinite()

    @rule(i=which)
    def no_head(self, i):
        remove_mntp_head(self.all[i].model)

    @rule(i=which)
    def adapter(self, i):
        peft = pytest.importorskip("peft")
        one = self.all[i]
        if one.blocks:
            return
        with_adapter = peft.get_peft_model(one.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        assert moves(with_adapter) == moved_by_last(one.mode)
        enable_bidirectional(with_adapter)
        assert moves(with_adapter) == BOTH
        base = one.model = with_adapter.unload()
        bring_back(one)
        base.requires_grad_(True)
        for name in [n for n in vars(base) if "peft" in n]:
            delattr(base, name)

    @rule(i=which)
    def prepare(self, i):
        accelerate = pytest.importorskip("accelerate")
        one = self.all[i]
        if one.blocks:
            return
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare_model(one.model, evaluation_mode=True)
        assert moves(prepared) == moved_by_last(one.mode)
        enable_bidirectional(prepared)
        assert moves(prepared) == BOTH
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert moves(one.model) == BOTH and is_bidirectional(one.model)
        bring_back(one)
        accelerate.state.AcceleratorState._reset_state(True)
        vars(one.model).pop("forward", None)  # accelerate leaves the stock forward bound to the instance
        vars(one.model).pop("_is_accelerate_prepared", None)

    @precondition(lambda self: self.compiles)
    @rule(i=which)
    def compile(self, i):
        self.compiles -= 1
        torch._dynamo.reset()
        one = self.all[i]
        assert moves(torch.compile(one.model, backend="eager")) == moved_by_last(one.mode)
        vars(one.model).pop("_is_torch_compile", None)  # transformers' own mark

    def teardown(self):
        for one in getattr(self, "all", ()):
            while one.blocks:
                one.blocks.pop()[0].__exit__(None, None, None)
            remove_mntp_head(one.model)
            disable_bidirectional(one.model)
            assert_twins(one.model, one.twin)


Orders.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
TestOrders = pytest.mark.slow(Orders.TestCase)
