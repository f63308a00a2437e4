"""Distillation: each text is trained towards the embedding that a finished encoder gives it."""

from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from ..load_errors import loading
from .data import Examples


def load_teacher(name: str) -> SentenceTransformer:
    """Load the finished encoder.

    Raises:
        ConfigError: There is no such encoder.
    """
    with loading(f"the teacher {name!r}"):
        return SentenceTransformer(name)


def add_projection(model: Any, teacher: SentenceTransformer) -> None:
    """Let the last module of an encoder be a linear layer to as many numbers as the teacher's embeddings have.

    It is trained and saved with the encoder, whose embeddings are then like the teacher's, which it can stand for.

    Args:
        model: A SentenceTransformer, changed in place.
        teacher: The finished encoder.
    """
    width = len(teacher.encode("a"))
    projection = Dense(model.get_embedding_dimension(), width, bias=False, activation_function=None)
    model.append(projection.to(model.device))


def with_embeddings(examples: Examples, teacher: SentenceTransformer, *, show_progress_bar: bool) -> Examples:
    """Single texts with the teacher's embeddings, which are computed here, once.

    Args:
        examples: Single texts.
        teacher: The finished encoder.
        show_progress_bar: Whether to show how far it is.

    Returns:
        Examples with the columns `anchor` and `label`, (width,), float32.
    """

    def embedded(data: Any) -> Any:
        vectors = teacher.encode(list(data["anchor"]), show_progress_bar=show_progress_bar)
        return data.select_columns(["anchor"]).add_column("label", list(vectors))

    data = examples.data
    several = isinstance(data, dict)
    return examples._replace(data=type(data)({n: embedded(d) for n, d in data.items()}) if several else embedded(data))
