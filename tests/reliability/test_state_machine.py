"""Whatever a user does to a model, in whatever order: the mode asked for is the mode in force, and the way back is exact.

A hypothesis state machine draws the orders. A twin of each model gets everything but the patch. The mode and its sink tokens are
seen in two ways: by changing a token and watching what moves, and by the twin, whose layers are given explicit 4D masks. At the
end, the patch undone, model and twin are equal bit for bit.
"""

import contextlib
import copy
import functools
import io
import tempfile
import types

import pytest
import torch
from packaging.version import Version
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402

from bidirect_patch import (  # noqa: E402
    apply_mntp_head,
    auto,  # noqa: F401  (its hooks are in place; whether it enables is said below)
    bidirectional,
    disable_bidirectional,
    enable_bidirectional,
    is_bidirectional,
)
from bidirect_patch.checkpoints import policy  # noqa: E402
from bidirect_patch.errors import GenerateError, OrderError, UnsupportedModelError  # noqa: E402
from bidirect_patch.mntp.head import remove_mntp_head  # noqa: E402

from ..helpers.changed_code import Place, has_place  # noqa: E402
from ..helpers.explicit_masks import sink_masks, under  # noqa: E402
from ..helpers.one_text import BOTH, CAUSAL, IDS, ONES, PADDED, moves, output  # noqa: E402
from ..helpers.tiny_models import SIZES, causal_lm  # noqa: E402
from ..helpers.twins import assert_twins  # noqa: E402
from ..helpers.versions import TRANSFORMERS  # noqa: E402

which = st.integers(0, 1)
NO_SINKS = (0, 0)
some_sinks = st.sampled_from([NO_SINKS, NO_SINKS, (1, 0), (2, 2)])  # tokens, and sinkless layers: none or all of the two
some_mode = st.one_of(st.just(False), some_sinks)
some_place = st.sampled_from(["attention", "layer", "kernel"])
some_wrapper = st.sampled_from(["closure", "partial", "method"])
some_wrapped = st.sampled_from(["model", "decoder", "attention"])
LAYERS = 2


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


def block_of(model, mode):
    tokens, layers = mode or NO_SINKS
    return bidirectional(model, mode is not False, num_sink_tokens=tokens, num_sinkless_layers=layers)


def explicit_masks(mode):
    """For each layer, who sees whom in a mode."""
    if mode is False:
        return [torch.ones(9, 9, dtype=torch.bool).tril()] * LAYERS
    return sink_masks(9, LAYERS, *mode)


def loss_of(model, ids=IDS):
    return model(input_ids=ids)[0].square().sum()


def gradients(model, loss):
    """The gradient of each parameter of a loss; None where it has none."""
    model.zero_grad(set_to_none=True)
    try:
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    finally:
        model.zero_grad(set_to_none=True)


def assert_near(actual, expected, what):
    """Two tensors are equal but for rounding, which is far below what one token more or less in sight changes."""
    rounding = 1e-9 if expected.dtype == torch.float64 else 1e-4
    error, size = (actual - expected).norm(), expected.norm()
    assert error <= rounding * size + 1e-12, (what, error.item(), size.item())


class NestedConfig(PretrainedConfig):
    """A config that holds another one: of a Llama, or of its own kind."""

    model_type = "nested_for_tests"

    def __init__(self, inner=None, **kwargs):
        if isinstance(inner, dict):
            inner = (NestedConfig if inner["model_type"] == self.model_type else LlamaConfig)(**inner)
        self.inner = inner
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self if self.inner is None else self.inner.get_text_config(*args, **kwargs)


class Nested(PreTrainedModel):
    """A model around another one."""

    config_class = NestedConfig
    _supports_sdpa = True

    def __init__(self, config, inner=None):
        super().__init__(config)
        self.inner = inner or (Nested if isinstance(config.inner, NestedConfig) else LlamaForCausalLM)(config.inner)
        if inner is None:
            self.post_init()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def _init_weights(self, module):
        pass


class Patched:
    """One model, its twin, and what it should be."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = causal_lm(tie_word_embeddings=False, initializer_range=0.2)
        self.twin = copy.deepcopy(self.model)
        self.mode = False  # causal, or the sinks of a bidirectional model
        self.blocks = []  # (block, mode found)
        self.wrapped = []  # modules with a plain wrapper on their forward, in the order of the wrappers

    @contextlib.contextmanager
    def twin_under(self, mode):
        """The twin, in which every layer is told who sees whom."""
        were = {module: module.training for module in self.twin.modules()}  # not all alike: resizing makes new ones
        self.twin.eval()  # there is no dropout, and no gradient checkpointing this way
        try:
            with under(self.twin.model.layers, explicit_masks(mode)):
                yield self.twin
        finally:
            for module, was in were.items():
                module.training = was

    def expected(self, mode):
        with self.twin_under(mode) as twin:
            return output(twin)

    @property
    def is_busy(self):
        """Whether it is in a block or wrapped, so that it can't be taken apart or copied."""
        return bool(self.blocks or self.wrapped)

    @property
    def is_patched(self):
        """Whether it is bidirectional, or in a block that ends in that."""
        return any(mode is not False for mode in (self.mode, *(found for _, found in self.blocks)))

    @property
    def is_checkpointed(self):
        return self.twin.training and self.twin.is_gradient_checkpointing

    @property
    def has_input_hook(self):
        """Whether transformers has its inputs require gradients, for gradient checkpointing."""
        return hasattr(self.twin, "_require_grads_hook")

    def unwrap(self):
        while self.wrapped:
            module, before = self.wrapped.pop()
            del module.forward
            if before is not None:
                module.forward = before

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
        self.code = None  # the functions of transformers that are replaced
        self.is_code_verified = True

    @invariant()
    def the_mode_asked_for_is_in_force(self):
        for one in getattr(self, "all", ()):
            if self.is_code_verified or one.mode is False:
                assert is_bidirectional(one.model) == (one.mode is not False)
            assert moves(one.model) == moved_by_last(one.mode)
            assert moves(one.model, at=0) == moved_by_first(one.mode)
            assert_near(output(one.model), one.expected(one.mode), one.mode)

    @rule(i=which, sinks=some_sinks)
    def enable(self, i, sinks):
        one = self.all[i]
        assert enable_with(one.model, sinks) is one.model
        assert is_bidirectional(one.model)
        one.mode = sinks

    @rule(i=which)
    def disable(self, i):
        one = self.all[i]
        assert disable_bidirectional(one.model) is one.model
        one.mode = False

    @rule(i=which, mode=some_mode)
    def enter(self, i, mode):
        one = self.all[i]
        if len(one.blocks) < 3:
            block = block_of(one.model, mode)
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

    @rule(i=which, inside=some_mode, then=st.one_of(st.none(), some_mode), trains=st.booleans())
    def late_backward(self, i, inside, then, trains):
        """A backward pass after the block of its forward, and after another change of mode: right, or an error."""
        one = self.all[i]
        for model in one.both:
            model.train(model.training or trains)
        if one.is_checkpointed and not one.is_patched and inside is False and then:
            return  # a forward that ran before the model was enabled: not promised
        with one.twin_under(inside) as twin:
            expected = gradients(twin, loss_of(twin))
        with block_of(one.model, inside):
            loss = loss_of(one.model)
        if then is not None:
            disable_bidirectional(one.model) if then is False else enable_with(one.model, then)
        now = one.mode if then is None else then
        try:
            actual = gradients(one.model, loss)
        except OrderError:
            assert one.is_checkpointed and inside is not False and now is False
        else:
            for name, gradient in expected.items():
                assert_near(actual[name], gradient, (name, inside, now))
        if then is not None:
            bring_back(one)

    @rule(i=which)
    def per_sample_gradients(self, i):
        """Those of two texts by `vmap`, beside those of one after the other."""
        one = self.all[i]
        if one.is_checkpointed or one.has_input_hook:
            return  # they know no vmap
        texts = torch.cat([IDS, IDS.flip(1)])

        def per_sample(model):
            def loss(parameters, ids):
                return functional_call(model, parameters, (), {"input_ids": ids[None]})[0].square().sum()

            parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
            return vmap(grad(loss), in_dims=(None, 0))(parameters, texts)

        if one.mode is False:
            try:
                per_sample(one.twin)
            except RuntimeError:
                return  # stock transformers' own business, which differs by release
        actual = per_sample(one.model)
        with one.twin_under(one.mode) as twin:
            for k, text in enumerate(texts):
                for name, gradient in gradients(twin, loss_of(twin, text[None])).items():
                    assert_near(actual[name][k], gradient, (name, one.mode))

    @rule(i=which, kind=some_wrapper, where=some_wrapped)
    def wrap(self, i, kind, where):
        """A wrapper that says nothing of what it calls, on an instance."""
        one = self.all[i]
        decoder = one.model.model
        module = {"model": one.model, "decoder": decoder, "attention": decoder.layers[1].self_attn}[where]
        before, inner = vars(module).get("forward"), module.forward
        if kind == "closure":
            module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        elif kind == "partial":
            module.forward = functools.partial(inner)
        else:
            module.forward = types.MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), module)
        one.wrapped.append((module, before))
        if one.mode is False:  # the patch could not be put on beneath it
            is_first = len(one.wrapped) == 1  # one beneath it may lead to the patch
            if where != "model" and is_first and not one.blocks:  # the model with the output head has no patch of its own
                with pytest.raises(OrderError, match="take that off, call this again"):
                    enable_bidirectional(one.model)
                assert not is_bidirectional(one.model) and moves(one.model) == CAUSAL
            one.unwrap()

    @precondition(lambda self: any(one.wrapped for one in self.all))
    @rule(i=which)
    def unwrap(self, i):
        self.all[i].unwrap()

    @precondition(lambda self: self.code is None)
    @rule(place=some_place)
    def change_code(self, place):
        """A function of transformers is replaced by one that does the same, for good or until `restore_code`."""
        decoder = self.all[0].model.model
        if has_place(place, decoder):
            self.code = pytest.MonkeyPatch()
            place = Place(place, decoder, self.code)
            place.put(place.same())
            self.is_code_verified = False

    @precondition(lambda self: self.code is not None)
    @rule()
    def restore_code(self):
        self.code.undo()
        self.code = None
        for one in self.all:
            bring_back(one)
        self.is_code_verified = True

    @precondition(lambda self: self.code is None)
    @rule(i=which, place=some_place, sinks=some_sinks, then=st.sampled_from(["none", "disable", "causal block"]))
    def causal_code(self, i, place, sinks, then):
        """A function of transformers is replaced by one that makes models causal, and put back."""
        one = self.all[i]
        decoder = one.model.model
        if not has_place(place, decoder):
            return
        if place == "kernel" and one.model.config._attn_implementation != "sdpa":
            return
        expected = one.expected(False)
        with pytest.MonkeyPatch.context() as patch:
            place = Place(place, decoder, patch)
            place.put(place.causal())
            for _ in range(2):
                assert moves(one.model) == CAUSAL and not is_bidirectional(one.model)
                assert_near(output(one.model), expected, "changed code")
                with pytest.raises(UnsupportedModelError, match="was not made bidirectional"):
                    enable_with(one.model, sinks)
                with pytest.raises(UnsupportedModelError), block_of(one.model, sinks):
                    raise AssertionError("the block was entered")
            if then == "disable":
                disable_bidirectional(one.model)
                assert moves(one.model) == CAUSAL and not is_bidirectional(one.model)
            elif then == "causal block":
                with contextlib.suppress(UnsupportedModelError), block_of(one.model, False):  # its end may find the code changed
                    assert moves(one.model) == CAUSAL
                assert not is_bidirectional(one.model)
        for each in self.all:
            bring_back(each)

    @rule(i=which, depth=st.integers(0, 2))
    def save_and_open(self, i, depth):
        """In configs nested so deep. Stock transformers opens it as what was saved, or as by `import bidirect_patch.auto`."""
        one = self.all[i]
        whole, config = one.model, dict(vars(one.model.config))
        for _ in range(depth):
            whole = Nested(NestedConfig(inner=whole.config), whole)
        with tempfile.TemporaryDirectory() as folder:
            whole.save_pretrained(folder)
            reads_flag = TRANSFORMERS >= Version("5.2") and one.mode in (False, NO_SINKS)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(policy, "auto_is_imported", not reads_flag)
                opened = type(whole).from_pretrained(folder) if depth else LlamaForCausalLM.from_pretrained(folder)
        vars(one.model.config).update(config)  # transformers writes into the config of a causal model that it saves
        opened = opened.to(one.model.dtype).eval()
        assert is_bidirectional(opened) == (one.mode is not False)
        assert moves(opened) == moved_by_last(one.mode)
        torch.testing.assert_close(output(opened), one.expected(one.mode), atol=1e-4, rtol=1e-4)

    @rule(i=which)
    def generate(self, i):
        one = self.all[i]
        if one.mode is not False:
            with pytest.raises(GenerateError):
                one.model.generate(IDS, max_new_tokens=2)
        elif not one.model.training:
            how = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
            assert torch.equal(one.model.generate(IDS, **how), one.twin.generate(IDS, **how))

    @rule(i=which)
    def deepcopy(self, i):
        one = self.all[i]
        if not one.is_busy:
            one.model = copy.deepcopy(one.model)

    @rule(i=which)
    def pickle(self, i):
        one = self.all[i]
        if not one.is_busy and not one.has_input_hook:  # which stock can't pickle
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

    @rule(i=which, size=st.sampled_from([SIZES["vocab_size"], 64]))
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

    @rule(i=which, layer=which, inside=some_mode)
    def paste(self, i, layer, inside):
        """A layer of the other model, in its mode; a block leaves the mixture as it is, and the verbs bring it to one state."""
        one, other = self.all[i], self.all[1 - i]
        if one.is_busy or other.is_busy:
            return
        pasted = copy.deepcopy(other.model.model.layers[layer]).to(one.model.dtype)
        backend = pasted.self_attn.config._attn_implementation
        if backend != one.model.config._attn_implementation or pasted.training != one.model.training:
            return
        one.model.model.layers[layer] = pasted
        one.twin.model.layers[layer] = copy.deepcopy(other.twin.model.layers[layer]).to(one.model.dtype)
        if (one.mode is False) != (other.mode is False):
            assert not is_bidirectional(one.model)
            with block_of(one.model, inside):
                assert moves(one.model) == moved_by_last(inside)
            with pytest.raises(OrderError, match="layer was put in or taken out"):
                one.model(input_ids=IDS)
        bring_back(one)

    @rule(i=which)
    def share(self, i):
        """A layer that both models hold, and then each holds its own again."""
        one, other = self.all[i], self.all[1 - i]
        if one.is_busy or other.is_busy or one.model.dtype != other.model.dtype:
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
        if one.blocks or any(module is one.model for module, _ in one.wrapped):  # the head would not be reached: an OrderError
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
        if one.is_busy or one.twin.is_gradient_checkpointing:  # PEFT would put a hook on the embeddings, which stays
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
        if one.is_busy:
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
        if getattr(self, "code", None) is not None:
            self.code.undo()
        for one in getattr(self, "all", ()):
            while one.blocks:
                one.blocks.pop()[0].__exit__(None, None, None)
            one.unwrap()
            remove_mntp_head(one.model)
            disable_bidirectional(one.model)
            assert_twins(one.model, one.twin)


def test_the_masks_tell_the_modes_apart():
    """What the machine sees by its twin can fail."""
    one = Patched(0)
    modes = [False, NO_SINKS, (1, 0), (2, 2)]
    states = [one.expected(mode) for mode in modes]
    for a in range(len(modes)):
        for b in range(a):
            with pytest.raises(AssertionError):
                assert_near(states[a], states[b] * (1 + 1e-2), "")
    assert_near(output(one.model), states[0], False)


Orders.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
TestOrders = pytest.mark.slow(Orders.TestCase)
