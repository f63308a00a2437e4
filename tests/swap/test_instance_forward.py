"""Forwards that another tool puts on an instance, before the patch or after it: none ever goes around the patch.

What each part does to the numbers tells which parts ran, and in which order: the module doubles, the patch adds 1 outside of
all that was there before it, and a wrapper multiplies by 10.
"""

import copy
import functools
import inspect
import pickle
from types import MethodType

import pytest
from torch import nn

from bidirect_patch.errors import OrderError
from bidirect_patch.swap.apply import apply
from bidirect_patch.swap.instance_forward import calls_the_patch
from bidirect_patch.swap.record import Plan

from ..helpers.double import HUNDRED, ONE, PATCHED, STOCK, Double, One, PlusHundred, PlusOne, X


def run(module):
    return module(X).item()


def wrap(module):
    """As accelerate's mixed precision does: a wrapper of the forward's function, bound to the instance."""
    inner = module.forward.__func__

    @functools.wraps(inner)
    def times_ten(self, x):
        return inner(self, x) * 10

    module.forward = MethodType(times_ten, module)
    return module.forward


def wrap_twice(module):
    wrap(module)
    return wrap(module)


def hook(module):
    """As accelerate's `add_hook_to_module` does: the forward that was found is kept in `_old_forward`."""
    old = module.forward
    module._old_forward = old

    def times_ten(module, x):
        return module._old_forward(x) * 10

    module.forward = functools.update_wrapper(functools.partial(times_ten, module), old)


def unhook(module):
    """As accelerate's `remove_hook_from_module` does."""
    module.forward = module._old_forward
    del module._old_forward


def replace(module):
    """A forward that says nothing of what it calls."""
    inner = module.forward
    module.forward = lambda x: inner(x) * 10


def unwrap(module):
    """As accelerate's `extract_model_from_parallel` does: `__wrapped__` is followed to its end, and that is bound."""
    module.forward = MethodType(inspect.unwrap(module.forward.__func__), module)


@pytest.fixture
def module():
    return Double()


def test_a_wrapper_before_the_patch_runs_inside_it(module):
    forward = wrap(module)
    before = dict(vars(module))
    apply([(module, ONE)])
    assert run(module) == STOCK * 10 + 1 and calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK * 10
    assert type(module) is Double and vars(module).keys() == before.keys()
    assert module.forward is forward, "the very object that was there"


def test_two_wrappers_before_the_patch_run_inside_it(module):
    forward = wrap_twice(module)
    apply([(module, ONE)])
    assert run(module) == STOCK * 100 + 1
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK * 100 and module.forward is forward


def test_a_wrapper_after_the_patch_runs_around_it(module):
    apply([(module, ONE)])
    wrap(module)
    assert run(module) == PATCHED * 10 and calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK * 10 and type(module) is Double, "the wrapper stays, and calls what is there now"
    apply([(module, ONE)])
    assert run(module) == PATCHED * 10 and calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    del module.forward
    assert run(module) == STOCK


def test_wrappers_before_and_after(module):
    inside = wrap(module)
    apply([(module, ONE)])
    wrap(module)
    assert run(module) == (STOCK * 10 + 1) * 10
    del module.forward
    assert run(module) == STOCK * 10 + 1
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK * 10 and module.forward is inside


@pytest.mark.parametrize("first", ["wrapper", "patch"])
def test_following_wrapped_to_its_end_never_goes_around_the_patch(module, first):
    if first == "wrapper":
        wrap(module)
    apply([(module, ONE)])
    if first == "patch":
        wrap_twice(module)
    unwrap(module)
    assert calls_the_patch(module)
    assert run(module) == (PATCHED if first == "patch" else STOCK * 10 + 1)
    apply(remove=[(module, PlusOne)])
    assert run(module) == (STOCK if first == "patch" else STOCK * 10) and type(module) is Double


def test_unwrapping_a_forward_that_nobody_wrapped_keeps_the_patch(module):
    apply([(module, ONE)])
    unwrap(module)
    assert run(module) == PATCHED and calls_the_patch(module)
    apply([(module, HUNDRED)])
    assert run(module) == PATCHED + 100 and calls_the_patch(module)
    apply(remove=[(module, PlusOne), (module, PlusHundred)])
    assert run(module) == STOCK and type(module) is Double
    assert module.forward.__func__ is Double.forward, "no function of the patch is left"


def test_every_step_of_the_chain_runs_the_patch(module):
    """Wherever a tool stops following `__wrapped__`: until the end, each function of the class calls the patch."""
    apply([(module, ONE)])
    function = type(module).forward
    steps = [function]
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        steps.append(function)
    assert len(steps) > 1 and [step(module, X).item() for step in steps] == [PATCHED] * len(steps)


def test_a_function_of_the_patch_that_is_kept_beyond_it_calls_the_stock_code(module):
    apply([(module, ONE)])
    kept, unwrapped = module.forward, MethodType(inspect.unwrap(type(module).forward), module)
    apply(remove=[(module, PlusOne)])
    assert kept(X).item() == unwrapped(X).item() == STOCK


def test_a_function_of_one_mixin_that_is_kept_runs_what_is_left(module):
    apply([(module, ONE), (module, HUNDRED)])
    kept = module.forward
    assert kept(X).item() == PATCHED + 100
    apply(remove=[(module, PlusHundred)])
    assert kept(X).item() == PATCHED
    apply(remove=[(module, PlusOne)])
    assert kept(X).item() == STOCK


@pytest.mark.parametrize("first", ["hook", "patch"])
@pytest.mark.parametrize("off", ["hook", "patch"])
def test_accelerates_hooks(module, first, off):
    """A hook runs around the patch, whichever came first, and each goes without the other."""
    if first == "hook":
        hook(module)
    apply([(module, ONE)])
    if first == "patch":
        hook(module)
    assert run(module) == PATCHED * 10 and calls_the_patch(module)
    if off == "hook":
        unhook(module)
        assert run(module) == PATCHED and calls_the_patch(module)
        apply(remove=[(module, PlusOne)])
    else:
        apply(remove=[(module, PlusOne)])
        assert run(module) == STOCK * 10
        unhook(module)
    assert run(module) == STOCK and type(module) is Double


def test_a_hook_that_was_there_has_its_old_forward_again(module):
    hook(module)
    old = module._old_forward
    apply([(module, ONE)])
    apply(remove=[(module, PlusOne)])
    assert module._old_forward is old and run(module) == STOCK * 10


def test_a_wrapper_under_a_hook(module):
    """Mixed precision first, a hook on top of it, then the patch."""
    wrap(module)
    hook(module)
    apply([(module, ONE)])
    assert run(module) == (STOCK * 10 + 1) * 10 and calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK * 100
    unhook(module)
    assert run(module) == STOCK * 10


@pytest.mark.parametrize("first, second", [(ONE, HUNDRED), (HUNDRED, ONE)], ids=["lower-first", "higher-first"])
@pytest.mark.parametrize("off", ["first", "second", "both"])
def test_a_wrapper_that_comes_between_two_mixins_runs_around_both(module, first, second, off):
    """It wrapped the patch, and calls whatever the patch is by now."""
    value = {PlusOne: 1, PlusHundred: 100}
    apply([(module, first)])
    forward = wrap(module)
    apply([(module, second)])
    assert run(module) == (STOCK + 101) * 10 and calls_the_patch(module)
    gone = {"first": [first], "second": [second], "both": [first, second]}[off]
    apply(remove=[(module, plan.mixin) for plan in gone])
    assert run(module) == (STOCK + 101 - sum(value[plan.mixin] for plan in gone)) * 10
    assert module.forward is forward and calls_the_patch(module)
    apply(remove=[(module, PlusOne), (module, PlusHundred)])
    assert run(module) == STOCK * 10 and module.forward is forward and type(module) is Double


@pytest.mark.parametrize("first, second", [(ONE, HUNDRED), (HUNDRED, ONE)], ids=["lower-first", "higher-first"])
@pytest.mark.parametrize("off", ["first", "second"])
def test_a_wrapper_before_two_mixins_runs_inside_both(module, first, second, off):
    value = {PlusOne: 1, PlusHundred: 100}
    forward = wrap(module)
    apply([(module, first)])
    apply([(module, second)])
    assert run(module) == STOCK * 10 + 101 and calls_the_patch(module)
    gone, left = (first, second) if off == "first" else (second, first)
    apply(remove=[(module, gone.mixin)])
    assert run(module) == STOCK * 10 + value[left.mixin] and calls_the_patch(module)
    apply(remove=[(module, left.mixin)])
    assert run(module) == STOCK * 10 and module.forward is forward


def test_new_settings_leave_a_wrapper_where_it_is(module):
    apply([(module, ONE)])
    forward = wrap(module)
    apply([(module, Plan(PlusOne, One(), {"is_causal": False}))])
    assert module.forward is forward and run(module) == PATCHED * 10
    apply(remove=[(module, PlusOne)])
    assert not hasattr(module, "is_causal")
    assert module.forward is forward and run(module) == STOCK * 10


def test_new_settings_leave_a_wrapper_inside(module):
    forward = wrap(module)
    apply([(module, ONE)])
    apply([(module, Plan(PlusOne, One(), {"is_causal": False}))])
    assert run(module) == STOCK * 10 + 1
    apply(remove=[(module, PlusOne)])
    assert module.forward is forward


def bind(module):
    """The stock forward on the instance, as a tool leaves it that took its wrapper off."""
    module.forward = MethodType(Double.forward, module)


@pytest.mark.parametrize("put", [hook, bind])
def test_new_settings_leave_a_forward_that_the_patch_replaced(module, put):
    put(module)
    before, stock = dict(vars(module)), run(module)
    apply([(module, ONE)])
    patched = run(module)
    apply([(module, Plan(PlusOne, One(), {"is_causal": False}))])
    assert run(module) == patched > stock and calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    assert run(module) == stock and vars(module) == before


def test_new_settings_after_somebody_took_the_forward_off(module):
    bind(module)
    apply([(module, ONE)])
    del module.forward
    apply([(module, Plan(PlusOne, One(), {"is_causal": False}))])
    assert run(module) == PATCHED and calls_the_patch(module)


def test_a_replaced_forward_before_the_patch_is_an_error(module):
    other = Double()
    replace(module)
    before = type(module), dict(vars(module))
    with pytest.raises(OrderError, match=r"forward was replaced on the instance by .*replace.*<lambda> \(.*\.py, line \d+\)"):
        apply([(other, ONE), (module, ONE)])
    assert (type(module), dict(vars(module))) == before
    assert type(other) is Double and run(other) == STOCK and run(module) == STOCK * 10


def test_a_replaced_forward_under_a_hook_is_an_error(module):
    replace(module)
    hook(module)
    with pytest.raises(OrderError, match="forward was replaced"):
        apply([(module, ONE)])


def test_another_modules_forward_before_the_patch_is_an_error(module):
    class Triple(nn.Module):
        def forward(self, x):
            return x * 3

    module.forward = Triple().forward
    with pytest.raises(OrderError, match="forward was replaced"):
        apply([(module, ONE)])
    assert type(module) is Double and run(module) == 9.0


def replace_by_partial(module):
    module.forward = functools.partial(lambda inner, x: inner(x) * 10, module.forward)


def replace_by_method(module):
    inner = module.forward
    module.forward = MethodType(lambda self, x: inner(x) * 10, module)


def replace_by_keyword(module):
    inner = module.forward
    module.forward = lambda *, x: inner(x=x) * 10


@pytest.mark.parametrize("put", [replace, replace_by_partial, replace_by_method])
def test_a_replaced_forward_after_the_patch_is_asked_whether_it_calls_it(module, put):
    apply([(module, ONE)])
    put(module)
    assert calls_the_patch(module) and run(module) == PATCHED * 10
    apply(remove=[(module, PlusOne)])
    assert type(module) is Double and run(module) == STOCK * 10, "what it kept calls the stock code by now"
    apply([(module, ONE)])
    assert calls_the_patch(module) and run(module) == PATCHED * 10


def test_a_replaced_forward_is_asked_by_keyword_too(module):
    apply([(module, ONE)])
    replace_by_keyword(module)
    assert calls_the_patch(module) and module(x=X).item() == PATCHED * 10


def test_a_replaced_forward_that_calls_another_modules_patch_is_not_taken_for_it(module):
    """As in a deep copy, in which the wrapper still calls the model that was copied."""
    other = Double()
    apply([(module, ONE), (other, ONE)])
    module.forward = lambda x: other.forward(x)
    assert not calls_the_patch(module)


def test_a_replaced_forward_that_calls_nothing_is_not_taken_for_it(module):
    apply([(module, ONE)])
    module.forward = lambda x: x
    assert not calls_the_patch(module)


def test_a_replaced_forward_is_asked_once(module):
    asked, inner = [], None
    apply([(module, ONE)])
    inner = module.forward

    def forward(x):
        asked.append(x)
        return inner(x)

    module.forward = forward
    assert calls_the_patch(module) and calls_the_patch(module) and len(asked) == 1


def test_the_stock_forward_bound_after_the_patch_is_not_taken_for_it(module):
    apply([(module, ONE)])
    module.forward = MethodType(Double.forward, module)
    assert run(module) == STOCK and not calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK


def test_the_stock_forward_bound_before_the_patch_becomes_the_patch(module):
    module.forward = bound = MethodType(Double.forward, module)
    apply([(module, ONE)])
    assert run(module) == PATCHED and calls_the_patch(module)
    apply(remove=[(module, PlusOne)])
    assert run(module) == STOCK and module.forward is bound


def test_the_signature_is_the_original_one(module):
    """Trainer picks columns by it."""
    signature = inspect.signature(Double.forward)
    wrap(module)
    apply([(module, ONE), (module, HUNDRED)])
    assert inspect.signature(type(module).forward) == signature
    assert list(inspect.signature(module.forward).parameters) == ["x"]


@pytest.mark.parametrize("first", ["wrapper", "patch"])
def test_a_deep_copy_calls_itself(module, first):
    """A bound forward is copied with the instance that it is bound to."""
    if first == "wrapper":
        wrap(module)
    apply([(module, ONE)])
    if first == "patch":
        wrap(module)
    twin = copy.deepcopy(module)
    assert run(twin) == run(module) and calls_the_patch(twin)
    assert "forward" not in vars(twin) or twin.forward.__self__ is twin
    apply(remove=[(twin, PlusOne)])
    assert run(twin) == STOCK * 10 and calls_the_patch(module)
    assert twin.forward.__self__ is twin
    assert run(module) == (STOCK * 10 + 1 if first == "wrapper" else PATCHED * 10)


def test_a_pickle_of_an_unwrapped_forward(module):
    apply([(module, ONE)])
    unwrap(module)
    del module.forward
    assert run(pickle.loads(pickle.dumps(module))) == PATCHED
