"""Distillation: each text is trained towards the embedding that a finished encoder gives it."""

from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from .data import Examples
from .saved_encoder import open_encoder

FITTED = 2000  # texts at most
RIDGE = 0.1  # of the mean square of what the layer is given: keeps the fit to few texts from following each of them


def load_teacher(name: str) -> SentenceTransformer:
    """Load the finished encoder.

    Raises:
        ConfigError: There is no such encoder.
    """
    model: SentenceTransformer = open_encoder(name, f"the teacher {name!r}")
    return model


def add_projection(model: Any, teacher: SentenceTransformer) -> None:
    """Let the last module of an encoder be a linear layer to as many numbers as the teacher's embeddings have.

    It is trained and saved with the encoder, whose embeddings are then like the teacher's, which it can stand for.

    Args:
        model: A SentenceTransformer, changed in place.
        teacher: The finished encoder.
    """
    width = len(teacher.encode("a"))
    projection = Dense(model.get_embedding_dimension(), width, bias=False, activation_function=None)
    model.append(projection.to(model.device, next(model.parameters()).dtype))


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


@torch.no_grad()
def fit_projection(model: Any, data: Any, *, show_progress_bar: bool) -> None:
    """Let the linear layer begin where least squares put it, as near the teacher's embeddings as it comes without training.

    Begun at random, it pulls the model towards a map that says nothing, for some hundreds of steps.

    Args:
        model: A SentenceTransformer that `add_projection` was called with, changed in place.
        data: What `with_embeddings` gave, of which up to 2,000 texts are used, evenly spread.
        show_progress_bar: Whether to show how far it is.
    """
    sets = list(data.values()) if isinstance(data, dict) else [data]
    rows = [each.select(range(0, len(each), -(-len(each) * len(sets) // FITTED))) for each in sets]
    texts = [text for each in rows for text in each["anchor"]]
    labels = torch.tensor([label for each in rows for label in each["label"]], dtype=torch.float64)
    *before, projection = model
    states = SentenceTransformer(modules=before, device=str(model.device)).encode(
        texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=show_progress_bar
    )
    given, wanted = states.double().cpu(), F.normalize(labels, dim=1)
    square = given.T @ given
    ridge = RIDGE * square.trace() / len(square) * torch.eye(len(square), dtype=square.dtype)
    projection.linear.weight.copy_(torch.linalg.solve(square + ridge, given.T @ wanted).T)
