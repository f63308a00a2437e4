"""The plugin in pytest runs of its own: what a user's test file sees, and what it leaves behind."""

from pathlib import Path
from textwrap import dedent

import pytest

import bidirect_patch

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow  # and depends on no release of transformers


@pytest.fixture
def run(pytester, monkeypatch):
    """`run(source)` runs a test file in a process of its own, with this plugin and no other."""
    monkeypatch.setenv("PYTHONPATH", str(Path(bidirect_patch.__file__).parents[1]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(source):
        pytester.makepyfile(test_user=dedent(source))
        return pytester.runpytest_subprocess("-p", "bidirect_patch.pytest_plugin")

    return run


def test_loads_neither_torch_nor_transformers_before_a_test_asks(run):
    result = run("""
        import sys

        def loaded():
            return {"torch", "transformers"} & set(sys.modules)

        def test_at_start():
            assert not loaded()

        def test_with_the_fixture_alone(bidirectional_model):
            assert not loaded()

        def test_at_first_use(assert_bidirectional):
            assert "torch" in loaded()
    """)
    result.assert_outcomes(passed=3)


def test_each_model_gets_back_the_mode_it_was_found_in(run):
    result = run("""
        import pytest, torch
        from transformers import LlamaConfig, LlamaModel
        from bidirect_patch import bidirectional, enable_bidirectional

        SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)

        @pytest.fixture(scope="module")
        def model():
            torch.manual_seed(0)
            return LlamaModel(LlamaConfig(**SIZES)).eval()

        @pytest.fixture(scope="module")
        def other():
            torch.manual_seed(1)
            return LlamaModel(LlamaConfig(**SIZES)).eval()

        def is_causal(model):
            "Changes the last token and looks at the positions before it."
            first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
            with torch.no_grad():
                first, second = model(first).last_hidden_state, model(second).last_hidden_state
            assert not torch.equal(first[:, -1], second[:, -1])
            return torch.equal(first[:, :-1], second[:, :-1])

        def test_enables_and_returns_the_same_object(model, other, bidirectional_model):
            assert is_causal(model) and is_causal(other)
            assert bidirectional_model(model) is model
            assert bidirectional_model(other) is other
            assert not is_causal(model) and not is_causal(other)

        def test_fails(model, other, bidirectional_model):
            assert is_causal(model) and is_causal(other)
            bidirectional_model(model)
            assert False, "on purpose"

        def test_asks_twice_and_disables_between(model, bidirectional_model):
            assert is_causal(model)
            bidirectional_model(model)
            with bidirectional(model, enabled=False):
                assert is_causal(model)
            bidirectional_model(model)

        def test_was_enabled_already(model, bidirectional_model):
            assert is_causal(model)  # had the first of two calls been undone first, the second would have won
            enable_bidirectional(model)
            bidirectional_model(model)

        def test_stays_enabled(model, other):
            assert not is_causal(model) and is_causal(other)

        def test_assertion_passes(model, assert_bidirectional):
            assert_bidirectional(model)

        def test_assertion_fails(other, assert_bidirectional):
            assert_bidirectional(other)
    """)
    result.assert_outcomes(passed=5, failed=2)
    result.stdout.fnmatch_lines(["*on purpose*", "FAILED *::test_fails *", "FAILED *::test_assertion_fails *"])
