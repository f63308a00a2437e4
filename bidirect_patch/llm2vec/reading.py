"""Instructions and texts as tokens, the way LLM2Vec 0.2.3 makes them, and which of the tokens its pooling counts.

LLM2Vec joins an instruction and a text with a space and a separator, may put a chat format and an end token round both, and takes
the separator out again. Pooled are as many tokens at the row's end as the part behind the separator has **when it is tokenized
alone**. A tokenizer may split that part otherwise there (a word at the beginning of a text, say), and then the count is off by
the difference. The same counts are made here, since weights that were trained with them expect them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from .encoder_settings import EncoderSettings

SEPARATOR = "!@#$%^&*()"

_INST = ("[INST] ", " [/INST]")
_IM = ("<|im_start|>user\n", "<|im_end|>")
# Model name -> what LLM2Vec writes before and after an instruction and its text.
CHAT_FORMATS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistralai/Mistral-7B-Instruct-v0.2": _INST,
    "meta-llama/Llama-2-7b-chat-hf": _INST,
    "google/gemma-2-9b-it": ("<bos><start_of_turn>user\n", "<end_of_turn>"),
    "Qwen/Qwen2-1.5B-Instruct": _IM,
    "Qwen/Qwen2-7B-Instruct": _IM,
}
# What it appends for pooling_mode eos_token: by model name, else by the config's model_type, else nothing.
END_OF_NAME = {"meta-llama/Meta-Llama-3-8B": "<|end_of_text|>", "meta-llama/Meta-Llama-3-8B-Instruct": ""}
END_OF_TYPE = {"llama": " </s>", "mistral": " </s>", "gemma": "<eos>", "qwen2": "<|endoftext|>"}
KNOWN_NAMES = {*CHAT_FORMATS, *END_OF_NAME}


@dataclass(frozen=True)
class TextFormat:
    """What stands before and after every text of one model.

    Example:
        >>> TextFormat.of("Qwen/Qwen2-7B-Instruct", "qwen2", "mean")
        TextFormat(chat=('<|im_start|>user\\n', '<|im_end|>'), end='')
        >>> TextFormat.of("", "llama", "eos_token").write(" a text ", "Find a fact:")
        'Find a fact: !@#$%^&*() a text </s>'
    """

    chat: tuple[str, str] | None
    end: str

    @classmethod
    def of(cls, model_name: str, model_type: str, pooling_mode: str) -> "TextFormat":
        """The format of a model by its name, the model_type of its config, and the way it is pooled."""
        end = END_OF_NAME.get(model_name, END_OF_TYPE.get(model_type, "")) if pooling_mode == "eos_token" else ""
        return cls(CHAT_FORMATS.get(model_name), end)

    def write(self, text: str, instruction: str) -> str:
        """The instruction, the separator and the text, and what belongs round them."""
        written = (f"{instruction.strip()} " if instruction else "") + SEPARATOR + text
        if self.chat is not None:
            written = self.chat[0] + written.strip() + self.chat[1]
        return written.strip() + self.end if self.end else written


def split_inputs(inputs: Sequence[Any], prompt: str | None) -> tuple[list[str], list[str]]:
    """The texts and the instruction of each.

    Args:
        inputs: Texts, or pairs of an instruction and a text as LLM2Vec takes them.
        prompt: The instruction of every text; None or "" means none.

    Raises:
        ConfigError: An input is neither, or it brings an instruction and there is a prompt too.
    """
    texts, instructions = [], []
    for one in inputs:
        pair = (prompt or "", one) if isinstance(one, str) else one
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ConfigError(f"an input must be a text, or a pair of an instruction and a text; got {one!r:.100}")
        if pair is one and prompt:
            raise ConfigError(f"prompt={prompt!r:.100} is given, and an input with an instruction of its own: {one!r:.100}")
        instructions.append(pair[0])
        texts.append(pair[1])
    return texts, instructions


def read(
    tokenizer: Any, form: TextFormat, settings: EncoderSettings, texts: list[str], instructions: list[str]
) -> dict[str, torch.Tensor]:
    """Tokenize texts with their instructions.

    Args:
        tokenizer: A tokenizer that pads on the left.
        form: What stands round each text.
        settings: How much is read, and what is pooled.
        texts: The texts.
        instructions: The instruction of each; "" means none.

    Returns:
        `input_ids`, `attention_mask` and `pooling_mask` (1 for tokens to pool), each int64 of shape (texts, length).
    """
    texts = [_shortened(tokenizer, text, settings) for text in texts]
    written = [form.write(text, instruction) for text, instruction in zip(texts, instructions)]
    most = {"truncation": True, "max_length": settings.max_length}
    whole = tokenizer([text.replace(SEPARATOR, "") for text in written], return_tensors="pt", padding=True, **most)
    ids, mask = whole["input_ids"].long(), whole["attention_mask"].long()
    if not ids.shape[1]:  # no text has a token: one column of padding
        ids, mask = ids.new_full((len(texts), 1), tokenizer.pad_token_id), mask.new_zeros((len(texts), 1))
    pooled = mask
    if settings.skip_instruction:
        behind = [text.split(SEPARATOR)[1] for text in written]
        counts = [len(row) for row in tokenizer(behind, add_special_tokens=False, **most)["input_ids"]]
        from_the_end = torch.arange(ids.shape[1], 0, -1)
        pooled = mask * (from_the_end <= torch.tensor(counts)[:, None])
    return {"input_ids": ids, "attention_mask": mask, "pooling_mask": pooled}


def check_tokenizer(tokenizer: Any, form: TextFormat, pooling_mode: str) -> None:
    """Prepare a tokenizer, in place, and check that it can do what the settings need.

    Raises:
        ConfigError: It has no token to pad with, or no beginning token that is to be pooled.
    """
    tokenizer.padding_side = "left"
    if tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError("the tokenizer has neither an end token nor a padding token: set tokenizer.eos_token and save it")
    if pooling_mode == "bos_token":
        ids = tokenizer(form.write("a", "").replace(SEPARATOR, ""))["input_ids"]
        if tokenizer.bos_token_id is None or tokenizer.bos_token_id not in ids:
            raise ConfigError(
                "pooling_mode='bos_token' needs a tokenizer that puts its beginning token before each text, and this one "
                "does not: take another pooling_mode"
            )


def _shortened(tokenizer: Any, text: str, settings: EncoderSettings) -> str:
    """Drop words at the end of a text until its tokens, without special ones, are few enough."""
    while True:
        options = {"add_special_tokens": False, "truncation": True, "max_length": settings.max_length}
        count = len(tokenizer(text, **options)["input_ids"])
        if count <= settings.doc_max_length:
            return text
        words = text.split()
        text = " ".join(words[: int(len(words) * (settings.doc_max_length / count))])
