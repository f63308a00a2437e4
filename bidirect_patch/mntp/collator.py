"""Masked next token prediction batches.

MNTP (BehnamGhader et al., "LLM2Vec", 2024, https://arxiv.org/abs/2404.05961) hides some tokens of a text and asks a
decoder that sees both sides to name them. Labels sit at the hidden token's own position; the stock causal loss shifts
by one, so position i is predicted from the output at i - 1, as the decoder was trained to do. The first token of a
document has nothing before it and is never chosen.

    ids     <s>   the   cat    sat   down
    input   <s>   the   _      sat   down
    labels  -100  -100  cat    -100  -100        "cat" is read off the output at "the"
"""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..errors import CollatorError, MaskTokenError

IGNORED = -100  # the label that the loss skips


class MNTPCollator:
    """Turn tokenized texts into MNTP batches: pad, choose tokens to predict, hide them.

    Each token that may be chosen is chosen with `mlm_probability`. Of the chosen, `mask_replace_prob` become the mask
    token, `random_replace_prob` a random token of the vocabulary that is not special, and the rest stay: BERT's
    80/10/10 by default. Never chosen: the first token of a sequence or document, special tokens, padding.

    Args:
        tokenizer: any transformers tokenizer, with or without a mask or pad token; it is read and never changed.
        mlm_probability: share of tokens to predict, in (0, 1].
        mask_token: what hides a token; default the tokenizer's own mask token, else `_`. Must be exactly one id.
        mask_replace_prob: share of the chosen tokens that become the mask token, in [0, 1].
        random_replace_prob: share of the chosen tokens that become a random one, in [0, 1].
        pad_to_multiple_of: round the padded length up to a multiple of this.
        padding_free: put all texts into one row and pad nothing; documents are told apart by `position_ids`.
        return_flash_attn_kwargs: with `padding_free`, add the document boundaries in the form that FlashAttention
            takes, as `DataCollatorWithFlattening` does.
        seed: draw from a generator of this collator's own, so that two collators with one seed give the same batches
            in the same order. Each dataloader worker draws its own stream, and fresh workers start it anew. Without a
            seed torch's global generator is used.

    Raises:
        MaskTokenError: the mask token isn't exactly one id of the tokenizer.
        CollatorError: a setting out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mlm_probability: float = 0.2,
        mask_token: str | None = None,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        padding_free: bool = False,
        return_flash_attn_kwargs: bool = False,
        seed: int | None = None,
    ) -> None:
        _require_share("mlm_probability", mlm_probability)
        if mlm_probability == 0:
            raise CollatorError("mlm_probability must be above 0, or nothing is ever predicted; got 0.")
        _require_share("mask_replace_prob", mask_replace_prob)
        _require_share("random_replace_prob", random_replace_prob)
        if mask_replace_prob + random_replace_prob > 1 + 1e-9:
            raise CollatorError(
                f"mask_replace_prob + random_replace_prob must not exceed 1; got {mask_replace_prob} + "
                f"{random_replace_prob}."
            )
        if pad_to_multiple_of is not None:
            _require_integer("pad_to_multiple_of", pad_to_multiple_of, least=1)
            if padding_free:
                raise CollatorError(
                    "padding_free pads nothing, so pad_to_multiple_of has no meaning; give one of them."
                )
        if return_flash_attn_kwargs and not padding_free:
            raise CollatorError("return_flash_attn_kwargs describes packed rows; it needs padding_free=True.")
        if seed is not None:
            _require_integer("seed", seed, least=0)

        if not callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
            raise CollatorError(f"tokenizer must be a transformers tokenizer; got {tokenizer!r}.")

        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.mask_replace_prob = mask_replace_prob
        self.random_replace_prob = random_replace_prob
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free
        self.return_flash_attn_kwargs = return_flash_attn_kwargs
        self.seed = seed
        self.mask_token_id = find_mask_token_id(tokenizer, mask_token)
        # Llama-3's <|eot_id|> and kin are special without being one of the tokenizer's named special tokens.
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        special = {*tokenizer.all_special_ids, *(i for i, token in added if getattr(token, "special", False))}
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        ordinary = np.setdiff1d(np.arange(len(tokenizer)), self._special_ids)
        self._replacements = torch.from_numpy(ordinary if ordinary.size else np.arange(len(tokenizer)))
        self._stream: tuple[int | None, torch.Generator] | None = None

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Make one batch.

        Args:
            features: a mapping per text with `input_ids`, and if wanted `attention_mask` (0 is padding),
                `special_tokens_mask` (1 is never chosen) and `position_ids` (a row packed of several documents, each
                starting where they stop counting up by one); or the ids alone. Lists, arrays or tensors of shape
                (length,). Other keys, labels among them, are dropped. `Trainer` hands on what the model's forward takes
                alone: `remove_unused_columns=False` keeps `special_tokens_mask`.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape (batch, length), int64, padded on the tokenizer's
            `padding_side`, labels -100 where nothing is scored; `position_ids` too if the features had them.
            With `padding_free`: `input_ids`, `labels` and `position_ids` of shape (1, total), positions counting from
            0 in each document; with `return_flash_attn_kwargs` also `cu_seq_lens_q` and `cu_seq_lens_k` of shape
            (documents + 1,), int32, and the integers `max_length_q` and `max_length_k`.

        Raises:
            CollatorError: features that hold no tokens, or whose parts differ in length.
        """
        rows = [_read_row(feature, index) for index, feature in enumerate(features)]
        if self.padding_free:
            rows = [_without_padding(row) for row in rows]
        lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
        if not lengths.sum():
            raise CollatorError(f"There is nothing to collate: {len(rows)} features with no token in them.")
        # All work is done on one line of tokens, (total,); padding is only how it is laid out in the end.
        ids = np.concatenate([row["input_ids"] for row in rows])
        real = _join(rows, "attention_mask", lengths, 1) != 0
        row_of = np.repeat(np.arange(len(rows)), lengths)
        starts = _document_starts(row_of, real, _join(rows, "position_ids", lengths, None))

        eligible = real & ~starts & ~np.isin(ids, self._special_ids)
        if any("special_tokens_mask" in row for row in rows):
            eligible &= _join(rows, "special_tokens_mask", lengths, 0) == 0
        tokens, labels = self._hide(torch.from_numpy(ids), torch.from_numpy(eligible), self.draws(rows))
        if self.padding_free:
            return self._in_one_row(tokens, labels, starts)
        return self._padded(tokens, labels, torch.from_numpy(real), rows, lengths)

    def draws(self, rows: list[dict[str, np.ndarray]]) -> torch.Tensor:
        """(3, total) uniform numbers for the tokens of a batch: whether to choose it, what hides it, by which token."""
        return torch.rand(3, sum(len(row["input_ids"]) for row in rows), generator=self._generator())

    def _generator(self) -> torch.Generator | None:
        if self.seed is None:
            return None
        worker = torch.utils.data.get_worker_info()
        key = None if worker is None else worker.id
        # A forked worker inherits the parent's stream, so the stream says whose it is.
        if self._stream is None or self._stream[0] != key:
            self._stream = key, seeded(self.seed, *([] if key is None else [key]))
        return self._stream[1]

    def _hide(
        self, ids: torch.Tensor, eligible: torch.Tensor, draws: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(total,) ids and who may be chosen -> (total,) ids with some hidden, and labels."""
        chosen = ((draws[0] < self.mlm_probability) & eligible).nonzero().squeeze(1)
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        draw = draws[1, chosen]
        hidden = ids.clone()
        hidden[chosen[draw < self.mask_replace_prob]] = self.mask_token_id
        swapped = chosen[(draw >= self.mask_replace_prob) & (draw < self.mask_replace_prob + self.random_replace_prob)]
        picks = (draws[2, swapped].double() * len(self._replacements)).long()
        hidden[swapped] = self._replacements[picks]
        return hidden, labels

    def _in_one_row(self, tokens: torch.Tensor, labels: torch.Tensor, starts: np.ndarray) -> dict[str, Any]:
        bounds = np.append(np.flatnonzero(starts), len(starts))
        document_lengths = np.diff(bounds)
        positions = np.arange(len(starts)) - np.repeat(bounds[:-1], document_lengths)
        batch: dict[str, Any] = {"input_ids": tokens[None], "labels": labels[None]}
        batch["position_ids"] = torch.from_numpy(positions)[None]
        if self.return_flash_attn_kwargs:
            boundaries = torch.from_numpy(bounds.astype(np.int32))
            longest = int(document_lengths.max())
            batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch

    def _padded(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        real: torch.Tensor,
        rows: list[dict[str, np.ndarray]],
        lengths: np.ndarray,
    ) -> dict[str, torch.Tensor]:
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(lengths.max()) // multiple) * multiple
        columns = np.arange(width)
        if self.tokenizer.padding_side == "left":
            taken = torch.from_numpy(columns >= width - lengths[:, None])  # (batch, width)
        else:
            taken = torch.from_numpy(columns < lengths[:, None])

        def lay_out(values: torch.Tensor, fill: int) -> torch.Tensor:
            laid = torch.full(taken.shape, fill, dtype=torch.int64)
            laid[taken] = values.to(torch.int64)
            return laid

        batch = {
            "input_ids": lay_out(tokens, self._pad_token_id()),
            "attention_mask": lay_out(real, 0),
            "labels": lay_out(labels, IGNORED),
        }
        if any("position_ids" in row for row in rows):
            # A row that came without positions beside rows that have them is one document.
            given = [row.get("position_ids", np.arange(len(row["input_ids"]))) for row in rows]
            batch["position_ids"] = lay_out(torch.from_numpy(np.concatenate(given)), 0)
        return batch

    def _pad_token_id(self) -> int:
        """Any id will do where attention_mask is 0; it only has to be one the embedding has."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return token_id
        return 0


def find_mask_token_id(tokenizer: Any, mask_token: str | None = None) -> int:
    """The one id of `mask_token`, by default the tokenizer's own mask token, else `_`.

    A vocabulary entry of that very spelling is taken first, as LLM2Vec does, else what encoding the string gives.

    Raises:
        MaskTokenError: it is several ids, or none.
    """
    if mask_token is None:
        mask_token = tokenizer.mask_token if tokenizer.mask_token is not None else "_"
    if not isinstance(mask_token, str) or not mask_token:
        raise MaskTokenError(f"mask_token must be a non-empty string; got {mask_token!r}.")
    unknown = tokenizer.unk_token_id if mask_token != tokenizer.unk_token else None
    token_id = tokenizer.convert_tokens_to_ids(mask_token)
    if token_id is not None and token_id != unknown:
        return token_id
    ids = [i for i in tokenizer.encode(mask_token, add_special_tokens=False) if i != unknown]
    if len(ids) != 1:
        raise MaskTokenError(
            f"The mask token must be exactly one id of the tokenizer; {mask_token!r} gives {len(ids)}"
            f"{f' ({ids})' if ids else ''}. Give a mask token that is in its vocabulary."
        )
    return ids[0]


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by all of `numbers`, each a non-negative integer; none of them washes out another."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _read_row(feature: Any, index: int) -> dict[str, np.ndarray]:
    """One text as arrays of shape (length,), int64."""
    if not isinstance(feature, Mapping):
        feature = {"input_ids": feature}
    if feature.get("input_ids") is None:
        held = [key for key, value in feature.items() if value is not None]
        raise CollatorError(f"Feature {index} has no input_ids, only {held}. Tokenize the texts first.")
    row = {}
    for key in ("input_ids", "attention_mask", "special_tokens_mask", "position_ids"):
        if feature.get(key) is None:
            continue
        try:
            value = np.asarray(feature[key])
        except (TypeError, ValueError) as error:
            raise CollatorError(f"{key} of feature {index} can't be read as numbers: {error}.") from error
        if value.ndim != 1 or (value.size and value.dtype.kind not in "iub"):
            raise CollatorError(
                f"{key} of feature {index} must be a row of integers, shape (length,); got shape {value.shape}, "
                f"{value.dtype}."
            )
        row[key] = value.astype(np.int64, copy=False)
        if len(row[key]) != len(row["input_ids"]):
            raise CollatorError(
                f"Feature {index} has {len(row['input_ids'])} input_ids and {len(row[key])} of {key}; they must match."
            )
    return row


def _join(rows: list[dict[str, np.ndarray]], key: str, lengths: np.ndarray, default: int | None) -> np.ndarray:
    """One key of all rows on one line, (total,); where a row lacks it `default`, or counting up if that is None."""
    return np.concatenate(
        [
            row[key] if key in row else np.arange(length) if default is None else np.full(length, default)
            for row, length in zip(rows, lengths)
        ]
    )


def _without_padding(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    real = row.pop("attention_mask", None)
    return row if real is None else {key: value[real != 0] for key, value in row.items()}


def _document_starts(row_of: np.ndarray, real: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(total,) True at the first real token of each row, and where positions stop counting up by one."""
    at = np.flatnonzero(real)
    starts = np.zeros(len(real), dtype=bool)
    starts[at] = np.diff(row_of[at], prepend=-1) != 0
    starts[at] |= np.diff(positions[at], prepend=-1) != 1
    return starts


def _require_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise CollatorError(f"{name} must be a number from 0 to 1; got {value!r}.")


def _require_integer(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise CollatorError(f"{name} must be an integer of at least {least}; got {value!r}.")
