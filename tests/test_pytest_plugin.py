"""The plugin in pytest runs of its own: what a user's test file sees, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import bidirect_patch

from .helpers.processes import Fork, finish

pytestmark = pytest.mark.slow  # and depends on no release of transformers
ALONE = ("-p", "bidirect_patch.pytest_plugin", "-p", "no:cacheprovider")
NO_OTHERS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_loads_neither_torch_nor_transformers_before_a_test_asks(tmp_path):
    (tmp_path / "test_user.py").write_text(dedent("""
        import sys
        import pytest

        def loaded():
            return {"torch", "transformers"} & set(sys.modules)

        def test_at_start():
            assert not loaded()

        def test_with_the_fixture_alone(bidirectional_model):
            assert not loaded()

        def test_at_first_use(request):
            sys.modules["torch"] = None  # it is enough that it would be loaded, which takes seconds
            with pytest.raises(ImportError, match="torch"):
                request.getfixturevalue("assert_bidirectional")
    """))
    environment = {**os.environ, **NO_OTHERS, "PYTHONPATH": str(Path(bidirect_patch.__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", *ALONE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and " 3 passed in " in done.stdout, done.stdout + done.stderr


def test_each_model_gets_back_the_mode_it_was_found_in(tmp_path):
    (tmp_path / "test_user.py").write_text(dedent("""
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

        def test_takes_sink_tokens(other, bidirectional_model):
            assert bidirectional_model(other, num_sink_tokens=1, num_sinkless_layers=1) is other
            assert not is_causal(other)
            with torch.no_grad():
                first, second = (other(torch.tensor([[1, 2, 3, last]])).last_hidden_state[:, 0] for last in (4, 9))
            assert torch.equal(first, second)

        def test_stays_enabled(model, other):
            assert not is_causal(model) and is_causal(other)

        def test_assertion_passes(model, assert_bidirectional):
            assert_bidirectional(model)

        def test_assertion_fails(other, assert_bidirectional):
            assert_bidirectional(other)
    """))
    out, err = finish(Fork("-m", "pytest", *ALONE, cwd=tmp_path, **NO_OTHERS), 200)
    assert "= 2 failed, 6 passed in " in out, out + err
    assert "on purpose" in out
    failed = [line.split(" - ")[0] for line in out.splitlines() if line.startswith("FAILED ")]
    assert failed == ["FAILED test_user.py::test_fails", "FAILED test_user.py::test_assertion_fails"]
