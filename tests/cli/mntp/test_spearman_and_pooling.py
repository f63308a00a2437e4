"""Spearman's correlation and the pooling of token vectors, beside scipy, sentence-transformers and counts by hand."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


@pytest.mark.parametrize(
    "one, two, expected",
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [-1, -2, -30], -1.0),
        ([1, 2, 3, 4], [0, 5, 3, 9], 0.8),  # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # the equal ones share the rank 2.5
        ([0, 0, 1, 1], [1, 2, 3, 4], 4 / math.sqrt(4 * 5)),
        ([1, 1, 1], [1, 2, 3], math.nan),
        ([1, 2, math.nan], [1, 2, 3], math.nan),
    ],
)
def test_correlation_by_hand(one, two, expected):
    from bidirect_patch.cli.mntp.sentence_pairs import spearman

    assert spearman(np.array(one, dtype=float), np.array(two, dtype=float)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("values", [3, 10, 10**6])
def test_correlation_beside_scipy(values):
    """With many equal numbers, with some and with none."""
    from bidirect_patch.cli.mntp.sentence_pairs import spearman

    spearmanr = pytest.importorskip("scipy.stats", reason="scipy isn't installed").spearmanr
    one, two = np.random.default_rng(values).integers(0, values, (2, 500)).astype(float)
    two += one
    assert spearman(one, two) == pytest.approx(spearmanr(one, two)[0], abs=1e-12)


@pytest.mark.parametrize("pooling, theirs", [("mean", "mean"), ("weighted_mean", "weightedmean")])
def test_pooling(pooling, theirs):
    """Padding counts nowhere, not even where it is no number."""
    from bidirect_patch.cli.mntp.sentence_pairs import pool

    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    lengths = [5, 2, 1]
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    found = pool(hidden.masked_fill(mask[..., None] == 0, math.nan), mask, pooling)
    for row, length in enumerate(lengths):
        weights = [n if pooling == "weighted_mean" else 1 for n in range(1, length + 1)]
        expected = sum(weight * hidden[row, at] for at, weight in enumerate(weights)) / sum(weights)
        assert torch.allclose(found[row], expected, atol=1e-6)
    models = pytest.importorskip("sentence_transformers.models", reason="sentence-transformers isn't installed")
    stock = models.Pooling(4, pooling_mode=theirs)({"token_embeddings": hidden, "attention_mask": mask})
    assert torch.allclose(found, stock["sentence_embedding"], atol=1e-6)


def test_half_precision_is_pooled_in_single():
    from bidirect_patch.cli.mntp.sentence_pairs import pool

    hidden = torch.full((1, 400, 1), 1000.0, dtype=torch.float16)
    assert pool(hidden, torch.ones(1, 400, dtype=torch.long), "mean").tolist() == [[1000.0]]
