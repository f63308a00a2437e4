"""Made-up texts of real lengths, and the tokenizer that the collators need."""

import torch
from transformers import PreTrainedTokenizerFast


def tokenizer(size: int = 1000) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words, with a mask and a pad token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", *(f"w{i}" for i in range(5, size))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def sentence_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal with median 40, from 4 to 256: a mean of about 51, one in twenty above 126."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (40 * (0.7 * normal).exp()).round().clamp(4, 256).int().tolist()


def texts(lengths: list[int], vocab: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """One text of random ordinary tokens for each length, between <s> and </s>."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(5, vocab, (max(n - 2, 0),), generator=generator).tolist() for n in lengths]
    return [{"input_ids": [1, *ids, 2]} for ids in made]
