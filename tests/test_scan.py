"""A sample of the scan: classes that differ in kind, with every argument that their signature names.

The whole scan is `python -m benchmarks.scan`, and its table is benchmarks/SCAN.md.
"""

import pytest
import torch

from .helpers import zoo

scan_release = pytest.importorskip("benchmarks.scan.scan_release", reason="the benchmarks come with the checkout alone")
from benchmarks.scan import models, reasons, scan_model, table  # noqa: E402
from benchmarks.scan.cases import LENGTH, cases  # noqa: E402

# Rotary positions, a mask in a buffer, ALiBi, a window, experts, kinds of tokens and cross-attention, windows in some layers.
SAMPLE = {
    **{"llama": "sdpa", "gpt2": "eager", "bloom": "eager", "mistral": "sdpa", "mixtral": "eager", "bert": "eager"},
    **{"gemma3": "sdpa"},
}
FEWEST = 20  # cases of a class
ON_EVERY_RELEASE = ("bloom", "mistral")  # the others run on the newest alone: each takes a second or two


@pytest.fixture(autouse=True)
def opening_is_as_before(monkeypatch):
    """The scan imports `bidirect_patch.auto`, and says for each case what opening does."""
    from bidirect_patch.checkpoints import policy

    monkeypatch.setattr(policy, "auto_is_imported", False)


def check(row):
    assert not row.why, row.why
    assert row.has_reference and len(row.outcomes) >= FEWEST
    unexplained = {
        case: outcome
        for case, outcome in row.outcomes.items()
        if not reasons.NEEDS_NO_REASON.match(outcome) and reasons.why(row.kind, case, outcome) is None
    }
    assert not unexplained
    assert list(row.outcomes.values()).count("equal") >= FEWEST // 2


@pytest.mark.parametrize(
    "model_type", [kind if kind in ON_EVERY_RELEASE else pytest.param(kind, marks=pytest.mark.slow) for kind in SAMPLE]
)
@pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning")  # labels are tried, not trained on
def test_each_argument_gives_what_an_explicit_mask_gives(model_type):
    if model_type not in zoo.buildable_types():
        pytest.skip("not in this transformers")
    cls, build = zoo.model_class(model_type), scan_release.causal_lm(model_type)
    check(scan_release.scan_class("causal LM", model_type, cls, build, SAMPLE[model_type]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning", "ignore::bidirect_patch.errors.CausalMaskWarning")
def test_a_multimodal_model_and_its_text_model_alone():
    if "llava" not in models.outer_types():
        pytest.skip("not in this transformers")

    def build(backend):
        return models.build_outer("llava", backend)

    try:
        stock = build("eager")
    except models.NotBuilt as error:
        pytest.skip(f"the stock model doesn't run on text alone: {error}")
    cls, inner = type(stock), scan_release.inner_name(stock)
    check(scan_release.scan_class("multimodal", "llava", cls, build, "eager"))
    check(scan_release.scan_class("text model alone", "llava", cls, build, "eager", inner))


def test_the_scan_sees_a_mask_that_is_causal(monkeypatch):
    """Not the check when a model is enabled, which is done by then: what the patch hands on is made causal afterwards."""
    from bidirect_patch.attention import model_forward

    scan = scan_model.Scan(lambda backend: zoo.build("llama", backend))
    make_mask = model_forward.make_mask
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    monkeypatch.setattr(
        model_forward, "make_mask", lambda *args: make_mask(*args).masked_fill(future, torch.finfo(torch.float32).min)
    )
    outcomes = {case.name: scan.outcome(case) for case in cases(scan.stock, scan.ids)}
    fine = {name for name, outcome in outcomes.items() if not outcome.startswith("differs")}
    assert {name for name in outcomes if "padded" in name} - fine == {
        name for name in outcomes if "padded" in name and "is_causal" not in name.split(",")[0]
    } | ({"is_causal off, padded"} & outcomes.keys())


def test_a_row_without_a_reason_is_told_and_the_table_has_none():
    outcomes = {"no argument": "equal", "labels": "differs: loss by 1e-01 of its largest value"}
    text, unexplained = table.section([scan_release.Row("causal LM", "toy", "ToyForCausalLM", "eager", True, outcomes)])
    assert unexplained == ["causal LM toy on eager, labels: differs: loss by 1e-01 of its largest value"]
    assert "| differs: loss | UNEXPLAINED | labels | toy |" in text
    assert "UNEXPLAINED" not in table.FILE.read_text(encoding="utf-8")
