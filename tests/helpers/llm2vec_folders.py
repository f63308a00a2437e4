"""Small bases and adapters in folders as LLM2Vec takes and makes them, and texts that its tokenizing treats differently."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from .saved import lora
from .tiny_models import tiny_model

INSTRUCTION = " Find a fact: "
TEXTS = [
    "the cat sat on the mat",
    "dogs",
    " a fact has a space before it and after it ",
    "find the cat, and find the dogs on a mat: the cat sat before it was found",
    "unknown words stay unknown",
]
NAMES = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "meta-llama/Llama-2-7b-chat-hf",
    "google/gemma-2-9b-it",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2-7B-Instruct",
    "meta-llama/Meta-Llama-3-8B",
)
POOLINGS = ("mean", "weighted_mean", "eos_token", "last_token", "bos_token")

_SPECIALS = ["<unk>", "<s>", "</s>", "<eos>", "<bos>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>"]
_SPECIALS += ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]
_LETTERS = "▁abcdefghijklmnopqrstuvwxyzFINST/[]<>:,\n"
_WORDS = "▁the ▁cat ▁sat ▁on ▁mat ▁dogs ▁Find ▁find ▁fact ▁has ▁space ▁before ▁and ▁after ▁it ▁found user".split()


def make_tokenizer(bos=True, prepend="always", end=False):
    """A BPE tokenizer with fixed merges, in which most words are one token after a space and several without one.

    Args:
        bos: Whether a beginning token stands before each text.
        prepend: "always": a text begins as after a space, as in Llama 2; "never": it does not, as in Llama 3.
        end: Whether an end token stands after each text.
    """
    merges = {}
    for word in _WORDS:
        for length in range(1, len(word)):
            merges[word[:length], word[length]] = None
    tokens = dict.fromkeys([*_SPECIALS, *_LETTERS, *("".join(pair) for pair in merges)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend)
    around = [*(["<s>"] if bos else []), "$A", *(["</s>"] if end else [])]
    if len(around) > 1:
        backend.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=_SPECIALS[3:],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=10000,
    )


def write_base(folder, family="llama", name="", tokenizer=None, **settings):
    """A tiny causal model and its tokenizer; config.json says `name`, as that of a downloaded model does. Returns the folder."""
    tokenizer = tokenizer or make_tokenizer()
    model = tiny_model(family, head=False, **{"vocab_size": len(tokenizer), **settings})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change_json(Path(folder) / "config.json", _name_or_path=name)
    return folder


def write_adapter(folder, base, seed=0, **settings):
    """An adapter over the model in `base`, with the settings in a llm2vec_config.json. Returns the folder."""
    from transformers import AutoModel

    model = lora(AutoModel.from_pretrained(base), seed=seed)
    model.save_pretrained(folder)
    change_json(Path(folder) / "adapter_config.json", base_model_name_or_path=str(base))
    if settings:
        write_settings(folder, **settings)
    return folder


def write_settings(folder, **settings):
    (Path(folder) / "llm2vec_config.json").write_text(json.dumps(settings))


def change_json(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
