"""Fixtures of the tests of `bidirect-patch sweep`."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...helpers.simcse_runs import write_pairs


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A folder with `model`, a tiny causal Llama whose tokenizer adds no token by itself, `dev.csv` and `test.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(60))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_pairs(folder / "dev.csv", count=40)
    write_pairs(folder / "test.jsonl", count=30, seed=1)
    return folder
