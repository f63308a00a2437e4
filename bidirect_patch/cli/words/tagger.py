"""The module that is trained: a model with a token classifier, of which the classifier reads the states of words."""

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .tokens import NO_WORD, Reading


class WordTagger(nn.Module):
    """Gives the logits of each word, by the layers of a `*ForTokenClassification`.

    Args:
        model: The model. What of its backbone is not trained stays in evaluation mode.
        reading: Where the label of a word is read.
    """

    def __init__(self, model: Any, reading: Reading) -> None:
        super().__init__()
        self.model = model
        self.reading = reading
        head_of(model)

    @property
    def config(self) -> Any:
        """The config of the model, which transformers' Trainer reads."""
        return self.model.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the model's own."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the model's own: the name of transformers 5.24, whose Trainer calls it."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def train(self, mode: bool = True) -> "WordTagger":
        """Set the mode. A backbone that is frozen has no dropout."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.model.base_model.parameters()):
            self.model.base_model.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, word_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Classify the words of a batch.

        Args:
            input_ids: (sentences, tokens), int64.
            attention_mask: (sentences, tokens), 1 for a token and 0 for padding.
            word_ids: (sentences, tokens), int64: the word that is read at each token, -1 for none.
            labels: (sentences, words), int64: -100 where nothing is scored; a label that the classifier does not have, which
                counts in no loss, is its number of labels or more.

        Returns:
            `loss`, the mean over all words with a label, in nats; `losses`, (sentences, words), 0 where nothing counts, both
            float32; `logits`, (sentences, words, labels).
        """
        states = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        logits = head_of(self.model)(word_states(states, word_ids, labels.shape[1], merge=self.reading.merge))
        counted = (labels >= 0) & (labels < logits.shape[-1])
        targets = labels.where(counted, -100)
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(
            labels.shape
        )
        return {"loss": losses.sum() / counted.sum(), "logits": logits, "losses": losses}


def word_states(states: Tensor, word_ids: Tensor, count: int, *, merge: bool) -> Tensor:
    """The state of each word: that of its first token, or the mean over its tokens.

    Args:
        states: (sentences, tokens, width).
        word_ids: (sentences, tokens), int64; -1 for a token of no word. The tokens of a word are next to each other.
        count: How many words.
        merge: Take the mean.

    Returns:
        (sentences, count, width), of the dtype of the states; zeros for a word without a token.

    Example:
        >>> states, word_ids = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]), torch.tensor([[-1, 0, 0, 1]])
        >>> word_states(states, word_ids, 3, merge=False).flatten().tolist()
        [2.0, 8.0, 0.0]
        >>> word_states(states, word_ids, 3, merge=True).flatten().tolist()
        [3.0, 8.0, 0.0]
    """
    read = word_ids != NO_WORD
    if not merge:
        read = read & (word_ids != nn.functional.pad(word_ids, (1, 0), value=NO_WORD)[:, :-1])
    weights = read[..., None].float()  # (sentences, tokens, 1)
    places = word_ids.clamp(min=0)[..., None]
    shape = (len(states), count)
    sums = states.new_zeros(*shape, states.shape[-1], dtype=torch.float32)
    sums = sums.scatter_add(1, places.expand_as(states), states.float() * weights)
    numbers = weights.new_zeros(*shape, 1).scatter_add(1, places, weights)
    return (sums / numbers.clamp(min=1)).to(states.dtype)


def head_of(model: Any) -> Any:
    """The layers of a `*ForTokenClassification` after its backbone, as one module: dropout, and the linear layer.

    Raises:
        ConfigError: The class has other layers.
    """
    layers = [child for name, child in model.named_children() if name != model.base_model_prefix]
    if [type(layer) for layer in layers] != [nn.Dropout, nn.Linear] or layers[1].bias is None:
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise ConfigError(
            f"words needs a classifier of dropout and one linear layer; {type(model).__name__} has {kinds}"
        )
    return nn.Sequential(*layers)
