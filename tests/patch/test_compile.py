"""torch.compile: one graph for each mode."""

import pytest
import torch
import torch.utils.checkpoint

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional

from ..helpers.references.plain_decoder import hidden_states, reach
from ..helpers.seeing import CLOSE, IDS, MASK
from ..helpers.versions import TRANSFORMERS


@pytest.fixture
def fullgraph():
    """`fullgraph(model, **inputs)`: the causal model compiled as one graph, and its counter; a skip where stock can't be."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()

    def compiled(model, **inputs):
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        try:
            compiled(**inputs)
        except Exception as error:  # whatever Dynamo raises
            pytest.skip(
                f"stock {type(model).__name__} of transformers {TRANSFORMERS} isn't one graph: {str(error)[:80]!r}"
            )
        return compiled, counter

    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "backend, padded",
    [
        ("sdpa", True),
        ("eager", False),
        pytest.param("sdpa", False, marks=pytest.mark.slow),
        pytest.param("eager", True, marks=pytest.mark.slow),
    ],
)
def test_one_graph_a_mode_when_compiled(make_model, fullgraph, backend, padded):
    model = make_model(backend=backend, head=False)
    inputs = dict(input_ids=IDS, attention_mask=MASK) if padded else dict(input_ids=IDS)
    inputs["use_cache"] = False
    real = MASK.bool() if padded else torch.ones_like(MASK).bool()
    with torch.no_grad():
        compiled, counter = fullgraph(model, **inputs)
        causal = model(**inputs).last_hidden_state
        with bidirectional(model):
            full = model(**inputs).last_hidden_state
        assert not torch.allclose(causal[:, 0], full[:, 0])
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).last_hidden_state[real], causal[real], **CLOSE)
            with bidirectional(model):
                torch.testing.assert_close(compiled(**inputs).last_hidden_state[real], full[real], **CLOSE)
    assert counter.frame_count <= 2


def test_the_compiled_wrapper_is_taken_like_the_model(make_model, fullgraph):
    model = make_model(head=False)
    with torch.no_grad():
        compiled, _ = fullgraph(model, input_ids=IDS, use_cache=False)
        assert enable_bidirectional(compiled) is compiled
        assert is_bidirectional(compiled) and is_bidirectional(model)
        full = compiled(input_ids=IDS, use_cache=False).last_hidden_state
        torch.testing.assert_close(full, hidden_states(model, IDS, torch.ones(2, 8, 8, dtype=torch.bool)), **CLOSE)
        disable_bidirectional(compiled)
        assert not is_bidirectional(model)
        causal = hidden_states(model, IDS, reach(torch.ones_like(IDS).bool(), causal=True))
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).last_hidden_state, causal, **CLOSE)
