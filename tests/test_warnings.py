"""Which warnings fail a test, by setup.cfg: those out of our own code, and our own kinds wherever they are said to be."""

import warnings

import pytest

from bidirect_patch import errors

ADAPTER = UserWarning("the adapter /somewhere was trained with bidirectional attention and is loaded as a causal model")


def warn(what, module):
    warnings.warn_explicit(what, None, f"{module}.py", 1, module=module)


@pytest.mark.parametrize("module", ["bidirect_patch", "bidirect_patch.swap.apply", "tests.test_warnings", "benchmarks.head"])
def test_a_warning_out_of_our_own_code_is_an_error(module):
    with pytest.raises(UserWarning, match="anything"):
        warn(UserWarning("anything"), module)
    with pytest.raises(DeprecationWarning):
        warn(DeprecationWarning("an old name"), module)


@pytest.mark.parametrize("what", [errors.CausalMaskWarning("a mask"), errors.LabelLeakWarning("labels"), ADAPTER], ids=repr)
def test_our_own_warnings_are_errors_wherever_they_are_said_to_be(what):
    with pytest.raises(type(what)):
        warn(what, "transformers.modeling_utils")


def test_every_own_warning_is_among_them():
    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Warning)]
    assert len(own) == 2
    for kind in own:
        with pytest.raises(kind):
            warn(kind("anything"), "torch.nn.modules.module")


def test_a_warning_of_another_library_about_itself_is_none_of_ours():
    with pytest.warns(DeprecationWarning, match="an old name"):
        warn(DeprecationWarning("an old name"), "bidirect_patch_of_others")
