"""A folder with a small model and sentences, for SimCSE and sentence-transformers."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from bidirect_patch import enable_bidirectional

WORDS = 60


def write_folder(folder):
    """Write `model`, a tiny causal Llama, `mntp`, an adapter over it, `texts.txt`, and `tasks` with rows of three texts."""
    import peft

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],  # as a decoder's: there are no token types
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.2, **sizes)).save_pretrained(
        folder / "model"
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(enable_bidirectional(LlamaModel.from_pretrained(folder / "model")), lora)
    adapted.save_pretrained(folder / "mntp")
    rng = random.Random(0)
    lines = [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randrange(3, 12))) for _ in range(64)]
    (folder / "texts.txt").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    rows = [{"query": a, "positive": b, "negative": c} for a, b, c in zip(lines, lines[1:], lines[2:])]
    (folder / "tasks").mkdir()
    for name in ("one", "two"):
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
