"""Masked next token prediction batches.

MNTP (BehnamGhader et al., "LLM2Vec", 2024, https://arxiv.org/abs/2404.05961) hides some tokens of a text and asks a
decoder that sees both sides to predict them. Labels stand at the hidden token's own position. The stock causal loss shifts
by one, so the output at position i - 1 predicts position i, as in the decoder's pretraining. The first token of a
document has no position before it and is never chosen.

    ids     <s>   the   cat    sat   down
    input   <s>   the   _      sat   down
    labels  -100  -100  cat    -100  -100        the output at "the" predicts "cat"
"""

import zlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention.padding_and_packing import starts
from ..errors import CollatorError
from .features import Row, join, read_rows, without_padding
from .tokens import check_tokenizer, find_mask_token_id, largest_id, pad_token_id, special_ids

IGNORED = -100  # the label that the loss skips
LONGEST_PADDING = 2**24  # no model reads longer rows; an accident such as a tokenizer's model_max_length of 10**30 is


class MNTPCollator:
    """Turn tokenized texts into MNTP batches: pad, choose tokens to predict, hide them.

    Each token that may be chosen is chosen with `mlm_probability`. Of the chosen tokens, a share of `mask_replace_prob` becomes
    the mask token, a share of `random_replace_prob` becomes a random token that is not special, and the rest stays. The
    defaults are BERT's 80/10/10 (Devlin et al., 2018, https://arxiv.org/abs/1810.04805). Never chosen: the first token of a
    sequence or document, its sink tokens, special tokens, padding.

    Args:
        tokenizer: any transformers tokenizer, with or without a mask or pad token. It is read and never changed.
        mlm_probability: share of tokens to predict, in (0, 1]. Or a range (low, high): each text, and each document of a packed
            row, has a share of its own, drawn uniformly from it.
        mask_token: the token that hides another one. Default: the tokenizer's own mask token, else `_`. It must be exactly
            one id.
        mask_replace_prob: share of the chosen tokens that become the mask token, in [0, 1].
        random_replace_prob: share of the chosen tokens that become a random token, in [0, 1].
        pad_to_multiple_of: round the padded length up to a multiple of this number.
        padding_free: put all texts into one row without padding. `position_ids` tell the documents apart.
        return_flash_attn_kwargs: with `padding_free`, add the document boundaries in the form that FlashAttention
            takes, as `DataCollatorWithFlattening` does.
        seed: draw from a generator of this collator's own, so that two collators with one seed give the same batches
            in the same order. Each dataloader worker draws its own stream, and new workers start it again. Without a
            seed, torch's global generator is used.
        repeatable: with a seed, the masks of a text depend on the seed and the text alone, whatever the batch, its order or
            its padding. Use it for evaluation: every evaluation then scores the same tokens.
        num_sink_tokens: that of `enable_bidirectional`. So many tokens at the start of each sequence or document are never
            chosen: they don't see the text, which could tell what they are.

    Raises:
        MaskTokenError: the mask token is not exactly one id of the tokenizer.
        CollatorError: a setting is out of range.

    Example:
        >>> from pathlib import Path
        >>> import bidirect_patch, transformers
        >>> folder = Path(bidirect_patch.__file__).parent / "demo_model"
        >>> tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        >>> collator = bidirect_patch.MNTPCollator(tokenizer, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0)
        >>> collator([{"input_ids": [7, 8, 9]}, {"input_ids": [7, 8]}])["labels"].tolist()
        [[-100, 8, 9], [-100, 8, -100]]
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mlm_probability: float | tuple[float, float] | list[float] = 0.2,
        mask_token: str | None = None,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        padding_free: bool = False,
        return_flash_attn_kwargs: bool = False,
        seed: int | None = None,
        repeatable: bool = False,
        num_sink_tokens: int = 0,
    ) -> None:
        share = _share_or_range(mlm_probability)
        _check_replacements(mask_replace_prob, random_replace_prob)
        _require_flag("padding_free", padding_free)
        _require_flag("return_flash_attn_kwargs", return_flash_attn_kwargs)
        _require_flag("repeatable", repeatable)
        _check_layout(pad_to_multiple_of, padding_free, return_flash_attn_kwargs)
        _check_seed(seed, repeatable)
        _require_integer("num_sink_tokens", num_sink_tokens, least=0)
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.mlm_probability = share
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.seed = seed
        self.repeatable = repeatable
        self.num_sink_tokens = int(num_sink_tokens)
        self.mask_token_id = find_mask_token_id(tokenizer, mask_token)
        self._special_ids = special_ids(tokenizer)
        self._size = len(tokenizer)  # a slow tokenizer counts it again each time
        everything = np.arange(self._size)
        ordinary = np.setdiff1d(everything, self._special_ids)
        self._replacements = torch.from_numpy(ordinary if ordinary.size else everything)
        self._stream: tuple[int | None, torch.Generator] | None = None

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Make one batch.

        Args:
            features: one mapping per text with `input_ids`. It may have `attention_mask` (0 is padding), `special_tokens_mask`
                (1 is never chosen) and `position_ids` (for a row packed of several documents: a document starts where they
                do not rise). Or the ids alone. Lists, arrays or tensors of integers, (length,). Other keys, labels
                among them, are dropped. `Trainer` passes on only what the model's forward takes:
                `remove_unused_columns=False` keeps `special_tokens_mask`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each (batch, length), int64, padded on the tokenizer's
            `padding_side`, labels -100 where nothing is scored. `position_ids` too if the features had them.
            With `padding_free`: `input_ids`, `labels` and `position_ids`, each (1, total), int64, positions counted from
            0 in each document. With `return_flash_attn_kwargs` also `cu_seq_lens_q` and `cu_seq_lens_k`,
            (documents + 1,), int32, and the integers `max_length_q` and `max_length_k`.

        Raises:
            CollatorError: features without tokens, with parts of different lengths, or with ids that the tokenizer does not have.
        """
        rows = read_rows(features)
        if self.padding_free:
            rows = [without_padding(row) for row in rows]
        lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
        if not lengths.sum():
            raise CollatorError(f"There is nothing to collate: {len(rows)} features with no token in them.")
        # All work is done on one line of tokens, (total,). Padding is only a layout, made at the end.
        ids = np.concatenate([row["input_ids"] for row in rows])
        self._check_ids(ids, lengths)
        real = torch.from_numpy(join(rows, "attention_mask", lengths, 1) != 0)
        first = _document_starts(rows, lengths, real)
        starts_document = _start_tokens(first, real, max(1, self.num_sink_tokens))
        eligible = real & ~starts_document & ~torch.from_numpy(np.isin(ids, self._special_ids))
        if any("special_tokens_mask" in row for row in rows):
            eligible &= torch.from_numpy(join(rows, "special_tokens_mask", lengths, 0) == 0)
        draws = self.draws(rows)
        is_chosen = eligible & (draws[0] < self._shares(draws, first))
        tokens, labels = self._hide(torch.from_numpy(ids), is_chosen, draws)
        if self.padding_free:
            return self._in_one_row(tokens, labels, first.numpy())
        return self._padded(tokens, labels, real, rows, lengths)

    def draws(self, rows: list[Row]) -> Tensor:
        """Uniform numbers for the tokens of a batch: whether to choose each, what hides it, by which token.

        Args:
            rows: the texts, each a dict of int64 arrays (length,) with `input_ids`.

        Returns:
            (3, total), float32, in [0, 1). With a range of shares (4, total): the last number of a document's first token
            says where in the range its share is.
        """
        if self.repeatable:
            assert self.seed is not None  # checked when the collator was made
            return torch.cat([text_draws(row, self.seed, count=self.draws_per_token) for row in rows], 1)
        total = sum(len(row["input_ids"]) for row in rows)
        return torch.rand(self.draws_per_token, total, generator=self._generator())

    @property
    def draws_per_token(self) -> int:
        """How many uniform numbers each token gets."""
        return 4 if isinstance(self.mlm_probability, tuple) else 3

    def _generator(self) -> torch.Generator | None:
        if self.seed is None:
            return None
        worker = torch.utils.data.get_worker_info()
        key = None if worker is None else worker.id
        # A forked worker inherits the parent's stream, so the stream says whose it is.
        if self._stream is None or self._stream[0] != key:
            self._stream = key, seeded(self.seed, *([] if key is None else [key]))
        return self._stream[1]

    def _check_ids(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        if ids.min() < 0:
            wrong, rule = ids < 0, "ids must be at least 0"
        elif ids.max() >= self._size:
            largest = largest_id(self.tokenizer)
            wrong, rule = ids > largest, f"the largest id of the tokenizer is {largest}: use the tokenizer that made the ids"
        else:
            return
        if wrong.any():
            at = int(wrong.argmax())
            index = int(np.searchsorted(lengths.cumsum(), at, side="right"))
            raise CollatorError(f"input_ids of feature {index} has the id {ids[at]}; {rule}.")

    def _shares(self, draws: Tensor, first: Tensor) -> Tensor | float:
        """The share of tokens to predict: one number, or that of each token's document, (total,).

        Args:
            draws: (4, total), float32, in [0, 1).
            first: (total,), bool, True where a document starts.
        """
        if not isinstance(self.mlm_probability, tuple):
            return self.mlm_probability
        low, high = self.mlm_probability
        of_documents = low + (high - low) * draws[3, first]
        before_any = of_documents.new_zeros(1)  # padding on the left
        return torch.cat([before_any, of_documents])[first.cumsum(0)]

    def _hide(self, ids: Tensor, is_chosen: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and which of them are to be predicted, (total,) -> ids with some hidden, and labels, both (total,)."""
        chosen = is_chosen.nonzero().squeeze(1)
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        draw = draws[1, chosen]
        hidden = ids.clone()
        hidden[chosen[draw < self.mask_replace_prob]] = self.mask_token_id
        swapped = chosen[(draw >= self.mask_replace_prob) & (draw < self.mask_replace_prob + self.random_replace_prob)]
        picks = (draws[2, swapped].double() * len(self._replacements)).long()
        hidden[swapped] = self._replacements[picks]
        return hidden, labels

    def _in_one_row(self, tokens: Tensor, labels: Tensor, first: np.ndarray) -> dict[str, Any]:
        bounds = np.append(np.flatnonzero(first), len(first))
        document_lengths = np.diff(bounds)
        positions = np.arange(len(first)) - np.repeat(bounds[:-1], document_lengths)
        batch: dict[str, Any] = {"input_ids": tokens[None], "labels": labels[None]}
        batch["position_ids"] = torch.from_numpy(positions)[None]
        if self.return_flash_attn_kwargs:
            boundaries = torch.from_numpy(bounds.astype(np.int32))
            longest = int(document_lengths.max())
            batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch

    def _padded(
        self, tokens: Tensor, labels: Tensor, real: Tensor, rows: list[Row], lengths: np.ndarray
    ) -> dict[str, Tensor]:
        multiple = int(self.pad_to_multiple_of or 1)
        width = -(-int(lengths.max()) // multiple) * multiple
        columns = np.arange(width)
        if getattr(self.tokenizer, "padding_side", "right") == "left":
            taken = torch.from_numpy(columns >= width - lengths[:, None])  # (batch, width)
        else:
            taken = torch.from_numpy(columns < lengths[:, None])

        def lay_out(values: Tensor, fill: int) -> Tensor:
            laid = torch.full(taken.shape, fill, dtype=torch.int64)
            laid[taken] = values.to(torch.int64)
            return laid

        batch = {
            "input_ids": lay_out(tokens, pad_token_id(self.tokenizer)),
            "attention_mask": lay_out(real, 0),
            "labels": lay_out(labels, IGNORED),
        }
        if any("position_ids" in row for row in rows):
            # A row without positions beside rows with positions is one document.
            batch["position_ids"] = lay_out(torch.from_numpy(join(rows, "position_ids", lengths, None)), 0)
        return batch


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream depends on each of `numbers`, integers of at least 0, but for zeros at their end."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def text_draws(row: Row, *numbers: int, count: int = 3) -> Tensor:
    """Uniform numbers for the tokens of one text that depend on `numbers` and its real tokens alone, (count, length), float32."""
    ids = row["input_ids"]
    real = row.get("attention_mask", np.ones_like(ids)) != 0
    draws = torch.zeros(count, len(ids))
    generator = seeded(*numbers, zlib.crc32(ids[real].tobytes()))
    draws[:, torch.from_numpy(real)] = torch.rand(count, int(real.sum()), generator=generator)
    return draws


def _document_starts(rows: list[Row], lengths: np.ndarray, real: Tensor) -> Tensor:
    """(total,), bool: True at the first real token of each row, and where a new document starts in it."""
    row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths))
    at = real.nonzero().squeeze(1)
    first = torch.zeros_like(real)
    first[at] = torch.diff(row_of[at], prepend=row_of.new_tensor([-1])) != 0
    if not any("position_ids" in row for row in rows):
        return first
    positions = torch.from_numpy(join(rows, "position_ids", lengths, None))
    return first | starts(positions[None], real[None])[0]


def _start_tokens(first: Tensor, real: Tensor, count: int) -> Tensor:
    """(total,), bool: True at the first `count` real tokens of each document.

    Args:
        first: (total,), bool, True where a document starts.
        real: (total,), bool, False at padding.
        count: 1 or more.
    """
    place = real.cumsum(0)  # from 1 on at the first real token
    start = torch.where(first, place, 0).cummax(0).values  # of the document that each token is in
    return real & (place - start < count)


def _share_or_range(given: Any) -> float | tuple[float, float]:
    """`mlm_probability` as the collator keeps it, checked."""
    if isinstance(given, (tuple, list)):
        if len(given) == 2 and all(_is_share(end) and end > 0 for end in given) and given[0] <= given[1]:
            return float(given[0]), float(given[1])
        raise CollatorError(
            "mlm_probability must be a number from 0 to 1, or a range of two such numbers above 0, the lower one first; got "
            f"{given!r}."
        )
    _require_share("mlm_probability", given)
    if given == 0:
        raise CollatorError("mlm_probability must be above 0, or nothing is ever predicted; got 0.")
    share: float = given
    return share


def _check_replacements(mask_replace_prob: Any, random_replace_prob: Any) -> None:
    _require_share("mask_replace_prob", mask_replace_prob)
    _require_share("random_replace_prob", random_replace_prob)
    if mask_replace_prob + random_replace_prob > 1 + 1e-9:
        raise CollatorError(
            f"mask_replace_prob + random_replace_prob must not exceed 1; got {mask_replace_prob} + {random_replace_prob}."
        )


def _check_layout(pad_to_multiple_of: Any, padding_free: bool, return_flash_attn_kwargs: bool) -> None:
    if pad_to_multiple_of is not None:
        _require_integer("pad_to_multiple_of", pad_to_multiple_of, least=1)
        if pad_to_multiple_of > LONGEST_PADDING:
            raise CollatorError(f"pad_to_multiple_of must be at most {LONGEST_PADDING}; got {pad_to_multiple_of}.")
        if padding_free:
            raise CollatorError("padding_free pads nothing, so pad_to_multiple_of has no meaning; give one of them.")
    if return_flash_attn_kwargs and not padding_free:
        raise CollatorError("return_flash_attn_kwargs describes packed rows; it needs padding_free=True.")


def _check_seed(seed: Any, repeatable: bool) -> None:
    if seed is not None:
        _require_integer("seed", seed, least=0)
    elif repeatable:
        raise CollatorError("repeatable=True draws the masks from the seed and the text; give a seed too.")


def _require_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise CollatorError(f"{name} must be True or False; got {value!r}.")


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= 1


def _require_share(name: str, value: Any) -> None:
    if not _is_share(value):
        raise CollatorError(f"{name} must be a number from 0 to 1; got {value!r}.")


def _require_integer(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise CollatorError(f"{name} must be an integer of at least {least}; got {value!r}.")
