"""torch.compile: one graph for each mode."""

import pytest
import torch
import torch.utils.checkpoint

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import OrderError
from bidirect_patch.model.find import decoders

from ..helpers import zoo
from ..helpers.one_text import ONE_SINK, TWO_SINKS, moves, output
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


@pytest.mark.slow
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


@pytest.fixture
def composite():
    """A bidirectional model that makes the mask of the decoder inside it, and that decoder."""
    if "gemma3" not in zoo.buildable_types():
        pytest.skip("no causal LM of this transformers makes the mask of a decoder inside it")
    torch._dynamo.reset()
    outer = enable_bidirectional(zoo.build("gemma3", "sdpa"), num_sink_tokens=1)
    yield outer, decoders(outer)[0].module
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["outer", "inner"])
def test_a_compiled_model_after_a_block_on_the_decoder_inside_it(composite, part):
    outer, inner = composite
    want = output(outer)
    if part == "inner":
        inner.compile(backend="eager")
    compiled = torch.compile(outer, backend="eager") if part == "outer" else outer
    for _ in range(2):
        torch.testing.assert_close(output(compiled), want, **CLOSE)
        with bidirectional(inner, enabled=False):
            pass
    assert moves(compiled) == ONE_SINK


@pytest.mark.slow
def test_a_compiled_model_whose_decoder_was_changed_alone(composite):
    outer, inner = composite
    compiled = torch.compile(outer, backend="eager")
    for change in (
        lambda: enable_bidirectional(inner, num_sink_tokens=2),
        lambda: enable_bidirectional(inner, num_sink_tokens=1, num_sinkless_layers=1),
        lambda: disable_bidirectional(inner),
    ):
        assert moves(compiled) == ONE_SINK
        change()
        with pytest.raises(OrderError, match="language_model.*enable_bidirectional.*disable_bidirectional"):
            output(compiled)
        enable_bidirectional(outer, num_sink_tokens=1)
    with bidirectional(inner, enabled=False), pytest.raises(OrderError, match="language_model"):
        output(compiled)
    enable_bidirectional(outer, num_sink_tokens=2)
    assert moves(compiled) == TWO_SINKS
