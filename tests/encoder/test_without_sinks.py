"""Pooling without sink tokens: the mask, and the module of sentence-transformers before its own Pooling."""

import pytest
import torch

from bidirect_patch.encoder.pooled import without_sinks
from bidirect_patch.errors import ConfigError

MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def by_rule(row, count):
    """The real places of a row but the first `count`; the last real one if there are no others."""
    real = [place for place, one in enumerate(row) if one]
    kept = real[count:] or real[-1:]
    return [int(place in kept) for place in range(len(row))]


@pytest.mark.parametrize("count", [0, 1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_the_mask(count, dtype):
    mask = torch.tensor(MASK).to(dtype)
    left = without_sinks(mask, count)
    assert left.dtype == dtype and left.int().tolist() == [by_rule(row, count) for row in MASK]
    assert torch.equal(mask, torch.tensor(MASK).to(dtype))


@pytest.fixture
def modules():
    pytest.importorskip("sentence_transformers", "5.4", reason="the module needs sentence-transformers 5.4")
    from sentence_transformers.sentence_transformer.modules import Pooling

    from bidirect_patch.encoder.without_sinks import WithoutSinks

    return WithoutSinks, Pooling


def rows(lengths, side="right"):
    """Token embeddings of texts of these lengths, and padding whose values are large."""
    width = max(lengths)
    tokens = torch.randn(len(lengths), width, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    mask = mask if side == "right" else mask.flip(1)
    return tokens.masked_fill(mask[..., None] == 0, 100.0), mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_pooling_is_that_of_the_texts_without_their_first_tokens(modules, side, count):
    WithoutSinks, Pooling = modules
    tokens, mask = rows([5, 3, 2, 1], side)
    for mode in ("mean", "max", "cls", "lasttoken"):
        pooling = Pooling(8, pooling_mode=mode)
        features = {"token_embeddings": tokens, "attention_mask": mask}
        found = pooling(WithoutSinks(count)(features))["sentence_embedding"]
        for row, real, embedding in zip(tokens, mask.bool(), found):
            words = row[real]
            words = words[min(count, len(words) - 1) :]
            expected = {"mean": words.mean(0), "max": words.amax(0), "cls": words[0], "lasttoken": words[-1]}[mode]
            torch.testing.assert_close(embedding, expected)
        assert features["attention_mask"] is mask  # a loss may give the same features again


def test_in_a_weighted_mean_the_first_word_has_the_weight_one(modules):
    """As in `mntp --eval_sts_pooling weighted_mean`; before 6, sentence-transformers counts from the row's beginning."""
    from bidirect_patch.cli.mntp.sentence_pairs import pool

    WithoutSinks, Pooling = modules
    for side in ("right", "left"):
        tokens, mask = rows([5, 3, 1], side)
        features = WithoutSinks(1)({"token_embeddings": tokens, "attention_mask": mask})
        found = Pooling(8, pooling_mode="weightedmean")(features)["sentence_embedding"]
        torch.testing.assert_close(found, pool(tokens, without_sinks(mask, 1), "weighted_mean"))
        words = tokens[0][mask[0].bool()][1:]
        weights = torch.arange(1.0, 5.0)[:, None]
        torch.testing.assert_close(found[0], (words * weights).sum(0) / weights.sum())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [3, torch.tensor([3])])
def test_a_prompt_is_counted_with_the_sinks(modules, side, length):
    WithoutSinks, Pooling = modules
    tokens, mask = rows([6, 5], side)
    features = WithoutSinks(1)({"token_embeddings": tokens, "attention_mask": mask, "prompt_length": length})
    found = Pooling(8, include_prompt=False)(features)["sentence_embedding"]
    expected = [row[real][3:].mean(0) for row, real in zip(tokens, mask.bool())]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("mode", ["mean", "max", "cls", "lasttoken"])
def test_texts_in_one_row_without_padding(modules, mode):
    pytest.importorskip("sentence_transformers", "6", reason="it pools such rows from 6 on")
    WithoutSinks, Pooling = modules
    tokens, mask = rows([5, 3, 2, 1])
    flat = torch.cat([row[real] for row, real in zip(tokens, mask.bool())])[None]
    ends = torch.tensor([0, 5, 8, 10, 11], dtype=torch.int32)
    numbers = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2 + [3]])
    features = {"token_embeddings": flat, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "seq_idx": numbers}
    pooling = Pooling(8, pooling_mode=mode)
    padded = pooling(WithoutSinks(2)({"token_embeddings": tokens, "attention_mask": mask}))["sentence_embedding"]
    torch.testing.assert_close(pooling(WithoutSinks(2)(features))["sentence_embedding"], padded)
    assert features["token_embeddings"] is flat and features["cu_seq_lens_q"] is ends


def test_without_a_mask_all_tokens_are_real(modules):
    WithoutSinks, _ = modules
    tokens, _ = rows([3, 3])
    features = WithoutSinks(1)({"token_embeddings": tokens})
    kept = [row[real].tolist() for row, real in zip(features["token_embeddings"], features["attention_mask"].bool())]
    assert kept == tokens[:, 1:].tolist()


def test_it_is_saved_and_opened(modules, tmp_path):
    WithoutSinks, _ = modules
    WithoutSinks(2).save(str(tmp_path))
    assert WithoutSinks.load(str(tmp_path)).num_sink_tokens == 2


@pytest.mark.parametrize("count", [-1, 1.0, True, None])
def test_the_number_is_checked(modules, count):
    with pytest.raises(ConfigError, match="num_sink_tokens must be an int of 0 or more"):
        modules[0](count)


@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_and_embeddings_stay_in_the_same_columns(modules, side):
    """For a module after it that weights words by their ids."""
    tokens, mask = rows([5, 3, 2, 1], side)
    ids = torch.arange(mask.numel()).reshape(mask.shape)
    by_id = tokens.reshape(-1, tokens.shape[-1])
    found = modules[0](1)({"token_embeddings": tokens, "attention_mask": mask, "input_ids": ids})
    assert torch.equal(by_id[found["input_ids"]], found["token_embeddings"])
