"""The conformance table: complete and clean for the newest release, and what it says is what is seen."""

import pytest
import torch
import transformers

from bidirect_patch import supported_architectures
from bidirect_patch.architectures import BIDIRECTIONAL, conformance

from .helpers import zoo

conformance_script = pytest.importorskip("benchmarks.conformance", reason="the benchmarks come with the checkout alone")

TABLE = conformance()
NEWEST = max(TABLE, key=lambda release: [int(n) for n in release.split(".")])
only_newest = pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"the table is checked on {NEWEST}")
KINDS = ("bidirectional", "refused", "not offered", "not run")


@only_newest
def test_every_type_of_the_mapping_has_a_row_and_none_stays_causal():
    assert sorted(TABLE[NEWEST]) == zoo.model_types()
    for model_type, row in TABLE[NEWEST].items():
        assert row["backends"] and set(row["backends"].values()) <= set(KINDS), model_type
        assert BIDIRECTIONAL in row["backends"].values() or row["why"], model_type


# One of each way in which a family is unlike Llama.
@only_newest
@pytest.mark.parametrize(
    "model_type",
    ["bloom", "deepseek_v3", "falcon", "gemma3_text", "gemma4_assistant", "gpt2", "gpt_neo", "gpt_oss", "jamba", "llama",
     "llama4_text", "mamba", "mistral", "mixtral", "modernbert-decoder", "mpt", "openai-gpt", "opt", "qwen3_next", "rwkv"],
)  # fmt: skip
def test_the_table_says_what_is_seen(model_type):
    for backend in ("eager", "sdpa"):
        said = TABLE[NEWEST][model_type]["backends"].get(backend)
        if said is not None:
            assert conformance_script.verdict(model_type, backend)[0] == said


@only_newest
@pytest.mark.parametrize("model_type", ["bloom", "gemma2", "gpt_neo", "llama4_text", "mpt", "openai-gpt", "qwen3"])
def test_tokens_move_what_they_should(model_type):
    """End to end, by the zoo's oracle and not by attention_report."""
    from bidirect_patch import enable_bidirectional

    model = zoo.build(model_type)
    causal = zoo.reach(model)
    assert not causal.triu(1).any()
    seen = zoo.reach(enable_bidirectional(model))
    assert torch.equal(seen, causal | causal.T) or seen.all()


def test_supported_architectures_agrees_with_the_table():
    for release, rows in TABLE.items():
        supported = supported_architectures(release)
        for model_type, row in rows.items():
            seen = tuple(b for b, verdict in row["backends"].items() if verdict == BIDIRECTIONAL)
            assert supported.get(model_type, ()) == seen
    assert "llama" in supported_architectures() and "mamba" not in supported_architectures()
    with pytest.raises(ValueError, match="no table for transformers 1.0"):
        supported_architectures("1.0")
