"""Plans on plain modules: what they change, and that all of it comes back exactly."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bidirect_patch.errors import ForeignWrapperError
from bidirect_patch.swap.apply import apply, commit, prepare
from bidirect_patch.swap.classes import RECORD, Swapped, has_mixin, original
from bidirect_patch.swap.record import (
    Plan,
    before_patch,
    buffers_before_patch,
    own_before_patch,
    record_of,
    settings_of,
)

from ..helpers.plain_modules import STOCK, Addend, Factor, Plus, Scale, Times, X, assert_same, plus, state, times


class Silent(Swapped):
    """Changes no method and has no note."""


class Failing(Swapped):
    """Can't be built."""

    @classmethod
    def build(cls, below, original):
        raise RuntimeError("no such class")


@pytest.fixture
def module():
    return Scale()


def test_a_forward_changes_and_comes_back(module):
    before = state(module)
    apply([(module, times())])
    assert isinstance(module, Scale) and has_mixin(module, Times) and original(type(module)) is Scale
    assert torch.equal(module(X), STOCK * 2)
    apply(remove=[(module, Times)])
    assert torch.equal(module(X), STOCK) and not has_mixin(module, Times)
    assert_same(before, state(module))


def test_a_patched_class_is_named_like_the_original(module):
    apply([(module, times())])
    cls = type(module)
    assert cls is not Scale
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(cls, name) == getattr(Scale, name)
    assert cls.forward.__qualname__ == Scale.forward.__qualname__


def test_one_class_for_all_modules_with_the_same_mixins():
    modules = [Scale() for _ in range(4)]
    apply([(module, plan) for module in modules[:2] for plan in (times(), plus())])
    apply([(modules[2], plus()), (modules[2], times())])
    apply([(modules[3], times())])
    apply([(modules[3], plus())])
    assert len({type(module) for module in modules}) == 1


@pytest.mark.parametrize(
    "name, there", [("of_instance", True), ("offset", True), ("of_class", False), ("is_causal", False)]
)
def test_attributes_change_and_come_back(module, name, there):
    """Also one that was the class's, and one that was nowhere."""
    before, found = state(module), getattr(module, name, None)
    apply([(module, Plan(Silent, attributes={name: 7}))])
    assert getattr(module, name) == 7 and (name in vars(module))
    assert before_patch(module, name) is found
    assert own_before_patch(module, name) is (found if there else None)
    apply(remove=[(module, Silent)])
    assert getattr(module, name, None) is found and (name in vars(module)) == there
    assert_same(before, state(module))


def test_an_attribute_that_is_set_meanwhile_goes_with_the_patch(module):
    before = state(module)
    apply([(module, Plan(Silent, attributes={"offset": 7}))])
    module.offset = 8
    module.other = "kept"
    apply(remove=[(module, Silent)])
    assert module.offset == 0.0 and module.other == "kept"
    del module.other
    assert_same(before, state(module))


def test_an_attribute_of_None_comes_back(module):
    module.nothing = None
    before = state(module)
    apply([(module, Plan(Silent, attributes={"nothing": 7}))])
    apply(remove=[(module, Silent)])
    assert_same(before, state(module))


@pytest.mark.parametrize("name", ["scale", "unsaved"])
def test_buffers_change_and_come_back(module, name):
    before, found = state(module), getattr(module, name)
    new = torch.full_like(found, 9.0)
    apply([(module, Plan(Silent, buffers={name: new}))])
    assert getattr(module, name) is new and buffers_before_patch(module)[name] is found
    assert dict(module.named_buffers())[name] is new
    apply(remove=[(module, Silent)])
    assert getattr(module, name) is found and module._buffers is before[1]["_buffers"]
    assert_same(before, state(module))


def test_buffers_that_moved_come_back_where_the_module_is(module):
    """The module was converted meanwhile: the old values, in the new dtype."""
    apply([(module, Plan(Silent, buffers={"scale": torch.tensor([8.0, 9.0])}))])
    module.double()
    assert module.scale.dtype == torch.float64
    assert buffers_before_patch(module)["scale"].dtype == torch.float64
    apply(remove=[(module, Silent)])
    assert module.scale.dtype == module.unsaved.dtype == torch.float64
    assert module.scale.tolist() == [1.0, 2.0] and type(module) is Scale


def test_a_buffer_of_None_comes_back_and_one_that_was_set_to_None_too(module):
    before = state(module)
    apply([(module, Plan(Silent, buffers={"empty": torch.ones(1), "scale": torch.zeros(2)}))])
    assert module.empty is not None and buffers_before_patch(module)["empty"] is None
    module.scale = None
    apply(remove=[(module, Silent)])
    assert module.empty is None and module.scale is before[2]["scale"]
    assert_same(before, state(module))


def test_buffers_that_moved_to_meta_come_back_there(module):
    apply([(module, Plan(Silent, buffers={"scale": torch.tensor([8.0, 9.0])}))])
    module.to("meta")
    apply(remove=[(module, Silent)])
    assert module.scale.is_meta and module.scale.shape == (2,)


def test_the_state_dict_names_what_it_named(module):
    names = list(module.state_dict())
    apply([(module, times(attributes={"offset": 1.0}, buffers={"scale": torch.ones(2)}))])
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("put", ["times-first", "plus-first", "together"])
@pytest.mark.parametrize("off", ["times-first", "plus-first", "together"])
def test_two_mixins_go_on_and_off_in_any_order(module, put, off):
    """Their order of calling is that of their rank, whichever came first."""
    before = state(module)
    mine = times(attributes={"offset": 1.0, "one": 1}, buffers={"scale": torch.ones(2)})
    other = plus(attributes={"two": 2}, buffers={"unsaved": torch.zeros(1)})
    for plans in {"times-first": ([mine], [other]), "plus-first": ([other], [mine]), "together": ([other, mine],)}[put]:
        apply([(module, plan) for plan in plans])
    want = (X * 3 + 1.0) * 2 + 1
    assert torch.equal(module(X), want) and (module.one, module.two) == (1, 2)
    if off == "together":
        apply(remove=[(module, Times), (module, Plus)])
    elif off == "times-first":
        apply(remove=[(module, Times)])
        assert torch.equal(module(X), STOCK + 1) and not hasattr(module, "one") and module.two == 2
        assert module.scale is before[2]["scale"] and module.unsaved.tolist() == [0.0]
        apply(remove=[(module, Plus)])
    else:
        apply(remove=[(module, Plus)])
        assert torch.equal(module(X), (X * 3 + 1.0) * 2) and not hasattr(module, "two") and module.one == 1
        assert module.unsaved is before[2]["unsaved"] and module.scale.tolist() == [1.0, 1.0]
        apply(remove=[(module, Times)])
    assert torch.equal(module(X), STOCK)
    assert_same(before, state(module))


class WithoutForward(Swapped):
    """A mixin without a forward, put on top of one that has one."""


def test_a_mixin_without_a_forward_does_not_repeat_the_one_below(module):
    apply([(module, times()), (module, Plan(WithoutForward))])
    assert torch.equal(module(X), STOCK * 2)


@pytest.mark.parametrize("first", [Times, Plus])
def test_two_mixins_may_set_the_same_attribute_and_buffer(module, first):
    before = state(module)
    apply([(module, times(attributes={"offset": 1.0}, buffers={"scale": torch.full((2,), 4.0)}))])
    apply([(module, plus(attributes={"offset": 2.0}, buffers={"scale": torch.full((2,), 5.0)}))])
    assert module.offset == 2.0 and module.scale.tolist() == [5.0, 5.0]
    apply(remove=[(module, first)])
    other = (2.0, [5.0, 5.0]) if first is Times else (1.0, [4.0, 4.0])
    assert (module.offset, module.scale.tolist()) == other
    apply(remove=[(module, Plus if first is Times else Times)])
    assert_same(before, state(module))


def test_one_off_and_another_on_in_one_step(module):
    before = state(module)
    apply([(module, times())])
    apply([(module, plus())], [(module, Times)])
    assert torch.equal(module(X), STOCK + 1) and not has_mixin(module, Times)
    apply(remove=[(module, Plus)])
    assert_same(before, state(module))


def test_applying_again_replaces_settings_attributes_and_buffers(module):
    before = state(module)
    apply([(module, times(2.0, attributes={"offset": 1.0, "gone": 1}, buffers={"scale": torch.full((2,), 4.0)}))])
    cls = type(module)
    apply([(module, times(5.0, attributes={"offset": 2.0, "new": 1}, buffers={"unsaved": torch.zeros(1)}))])
    assert type(module) is cls and len(record_of(module).plans) == 1
    assert settings_of(module, Factor) == Factor(5.0)
    assert module.offset == 2.0 and module.new == 1 and not hasattr(module, "gone")
    assert module.scale is before[2]["scale"] and module.unsaved.tolist() == [0.0]
    assert torch.equal(module(X), (STOCK + 2.0) * 5)
    apply(remove=[(module, Times)])
    assert_same(before, state(module))


def test_taking_off_what_is_not_there_changes_nothing(module):
    before = state(module)
    apply(remove=[(module, Times)])
    assert_same(before, state(module))
    apply([(module, plus())])
    before = state(module)
    apply(remove=[(module, Times)])
    assert type(module) is before[0] and torch.equal(module(X), STOCK + 1)


def test_settings_are_found_by_their_type(module):
    assert settings_of(module, Factor) is None
    apply([(module, times()), (module, plus())])
    assert settings_of(module, Factor) == Factor(2.0) and settings_of(module, Addend) == Addend(1.0)
    assert settings_of(module, str) is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_patched_and_goes_back_by_itself(module, copied):
    apply([(module, times(attributes={"offset": 1.0}, buffers={"scale": torch.full((2,), 4.0)})), (module, plus())])
    twin = copied(module)
    assert type(twin) is type(module) and twin.scale is not module.scale
    assert torch.equal(twin(X), module(X)) and settings_of(twin, Factor) == Factor(2.0)
    apply([(twin, times(3.0))])
    assert settings_of(module, Factor) == Factor(2.0), "the settings are the copy's own"
    apply(remove=[(twin, Times), (twin, Plus)])
    assert type(twin) is Scale and vars(twin).keys() == vars(Scale()).keys()
    assert twin.offset == 0.0 and torch.equal(twin.scale, Scale().scale) and torch.equal(twin(X), STOCK)
    assert torch.equal(module(X), (X * 3 * 4 + 1.0) * 2 + 1), "the original is still patched"
    apply(remove=[(module, Times), (module, Plus)])
    assert torch.equal(module(X), STOCK)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle(module, protocol):
    apply([(module, times())])
    assert torch.equal(pickle.loads(pickle.dumps(module, protocol))(X), STOCK * 2)


def test_a_pickle_without_the_patch_holds_nothing_of_it(module):
    plain = pickle.dumps(module)
    apply([(module, times(attributes={"offset": 1.0}))])
    apply(remove=[(module, Times)])
    assert b"bidirect_patch" not in pickle.dumps(module).replace(b"tests.", b"")
    assert len(pickle.dumps(module)) == len(plain)


def test_a_class_on_top_is_not_dropped(module):
    apply([(module, times(attributes={"offset": 1.0}))])
    patched = type(module)
    module.__class__ = type("SomebodyElses", (patched,), {})
    before = state(module)
    for change in (dict(remove=[(module, Times)]), dict(add=[(module, plus())])):
        with pytest.raises(ForeignWrapperError, match="SomebodyElses"):
            apply(**change)
        assert_same(before, state(module))
    apply([(module, times(5.0))])
    assert type(module).__name__ == "SomebodyElses", "new settings alone leave it where it is"
    assert torch.equal(module(X), STOCK * 5)
    module.__class__ = patched
    apply(remove=[(module, Times)])
    assert type(module) is Scale and torch.equal(module(X), STOCK)


def test_a_class_under_the_patch_stays(module):
    """Somebody else's class that was there before the patch is an original like any other."""
    module.__class__ = theirs = type("SomebodyElses", (Scale,), {"forward": lambda self, x: -Scale.forward(self, x)})
    apply([(module, times())])
    assert torch.equal(module(X), -STOCK * 2)
    apply(remove=[(module, Times)])
    assert type(module) is theirs


def test_an_error_for_one_module_leaves_every_module_as_it_was(module):
    other, third = Scale(), Scale()
    apply([(third, times())])
    third.__class__ = type("SomebodyElses", (type(third),), {})
    before = [state(m) for m in (module, other, third)]
    with pytest.raises(RuntimeError, match="no such class"):
        apply([(module, times(attributes={"offset": 1.0})), (other, Plan(Failing))])
    with pytest.raises(ForeignWrapperError):
        apply([(module, times(buffers={"scale": torch.ones(2)})), (other, plus())], [(third, Times)])
    for m, then in zip((module, other, third), before, strict=True):
        assert_same(then, state(m))


def test_preparing_changes_nothing_and_committing_does(module):
    before = state(module)
    changes = prepare([(module, times(attributes={"offset": 1.0}, buffers={"scale": torch.ones(2)}))])
    assert_same(before, state(module))
    commit(changes)
    assert has_mixin(module, Times) and module.offset == 1.0
    changes = prepare(remove=[(module, Times)])
    assert has_mixin(module, Times)
    commit(changes)
    assert_same(before, state(module))


def test_repr_shows_the_notes(module):
    plain = repr(module)
    apply([(module, times())])
    assert repr(module) == "Scale(2, times)"
    apply([(module, plus())])
    assert repr(module) == "Scale(2, times, plus)"
    apply(remove=[(module, Times)])
    apply([(module, Plan(Silent))])
    assert repr(module) == "Scale(2, plus)"
    apply(remove=[(module, Plus), (module, Silent)])
    assert repr(module) == plain == "Scale(2)"


def test_repr_of_a_module_with_nothing_to_say():
    linear = nn.ReLU()
    apply([(linear, Plan(Times, Factor(1.0)))])
    assert repr(linear) == "ReLU(times)"


def test_one_name_in_the_instance_holds_it_all(module):
    names = set(vars(module))
    apply([(module, times()), (module, plus())])
    assert set(vars(module)) - names == {RECORD}


def test_hooks_and_training_mode_are_left_alone(module):
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    apply([(module.eval(), times())])
    module(X)
    assert not module.training and torch.equal(seen[0], STOCK * 2)
    apply(remove=[(module, Times)])
    module(X)
    handle.remove()
    assert torch.equal(seen[1], STOCK) and not module.training
