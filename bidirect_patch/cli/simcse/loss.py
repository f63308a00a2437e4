"""The loss: cross-entropy over the cosines of each anchor with every positive and hard negative of the batch."""

from typing import Any

from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from .settings import EncoderArguments


def make_loss(model: Any, settings: EncoderArguments, *, gather: bool) -> Any:
    """Make the loss that the settings describe.

    Args:
        model: The SentenceTransformer to train.
        settings: The scale of the cosines; `mini_batch_size` for GradCache; `matryoshka_dims` for losses of shorter
            embeddings.
        gather: Take the texts of every process as negatives, as LLM2Vec does.
    """
    options = {"scale": settings.loss_scale, "gather_across_devices": gather}
    if settings.mini_batch_size:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings.mini_batch_size, **options)
    else:
        loss = MultipleNegativesRankingLoss(model, **options)
    return MatryoshkaLoss(model, loss, settings.matryoshka_dims) if settings.matryoshka_dims else loss
