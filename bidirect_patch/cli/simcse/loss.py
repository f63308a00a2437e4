"""The loss: cross-entropy over the cosines of each anchor with every positive and hard negative of the batch.

With a teacher it is one minus the cosine of each embedding with the teacher's.
"""

from typing import Any

from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from ...errors import BackendError
from .settings import EncoderArguments


def make_loss(model: Any, settings: EncoderArguments, *, gather: bool) -> Any:
    """Make the loss that the settings describe.

    Args:
        model: The SentenceTransformer to train.
        settings: The scale of the cosines; `mini_batch_size` for GradCache; `matryoshka_dims` for losses of shorter
            embeddings; or a teacher, whose embeddings are the labels.
        gather: Take the texts of every process as negatives, as LLM2Vec does.

    Raises:
        BackendError: sentence-transformers is too old to have the loss that a teacher needs.
    """
    if settings.teacher:
        return distillation_loss()(model, distance_metric="cosine")
    options = {"scale": settings.loss_scale, "gather_across_devices": gather}
    if settings.mini_batch_size:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings.mini_batch_size, **options)
    else:
        loss = MultipleNegativesRankingLoss(model, **options)
    return MatryoshkaLoss(model, loss, settings.matryoshka_dims) if settings.matryoshka_dims else loss


def distillation_loss() -> Any:
    """sentence-transformers' class of the loss that a teacher needs.

    Raises:
        BackendError: sentence-transformers is too old to have it.
    """
    try:
        from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
    except ImportError as error:
        raise BackendError("teacher needs sentence-transformers 5.5 or newer, which has the loss EmbedDistillLoss") from error
    return EmbedDistillLoss
