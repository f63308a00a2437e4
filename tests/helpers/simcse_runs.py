"""Running the contrastive command, with LLM2Vec's settings files and data in the layout of theirs."""

import json
import random
from pathlib import Path

from bidirect_patch.cli import main

# The keys of LLM2Vec's train_configs/simcse/*.json and train_configs/supervised/*.json, all of them.
SHARED = {
    "bidirectional": True,
    "pooling_mode": "mean",
    "remove_unused_columns": False,
    "gradient_accumulation_steps": 1,
    "do_train": True,
    "disable_tqdm": False,
    "overwrite_output_dir": True,
    "logging_steps": 50,
    "save_steps": 200,
    "save_only_model": True,
    "stop_after_n_steps": 1000,
    "lora_r": 16,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "seed": 42,
}
SIMCSE = SHARED | {
    "simcse_dropout": 0.3,
    "dataset_name": "Wiki1M",
    "dataset_file_path": "cache/wiki1m_for_simcse.txt",
    "learning_rate": 3e-5,
    "loss_scale": 20,
    "per_device_train_batch_size": 128,
    "max_seq_length": 128,
}
SUPERVISED = SHARED | {
    "dataset_name": "E5",
    "dataset_file_path": "cache/echo-data",
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "warmup_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_seq_length": 512,
}
# What differs between the files of a folder: name of the model, of the adapter, of the folder for the result.
MODELS = {
    "Llama2": ("meta-llama/Llama-2-7b-chat-hf", "McGill-NLP/LLM2Vec-Llama-2-7b-chat-hf-mntp", "Llama-2-7b-chat-hf"),
    "MetaLlama3": (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
        "Meta-Llama-3-8B-Instruct",
    ),
    "MetaLlama3.1": (
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "output/mntp/Meta-Llama-3.1-8B-Instruct/checkpoint-1000",
        "Meta-Llama-3.1-8B-Instruct",
    ),
    "Mistral": (
        "mistralai/Mistral-7B-Instruct-v0.2",
        "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp",
        "Mistral-7B-Instruct-v0.2",
    ),
    "Sheared-Llama": (
        "princeton-nlp/Sheared-LLaMA-1.3B",
        "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp",
        "Sheared-LLaMA-1.3B",
    ),
}
PUBLISHED = {f"supervised/{name}": (SUPERVISED, name) for name in MODELS}
PUBLISHED |= {f"simcse/{name}": (SIMCSE, name) for name in MODELS if name != "MetaLlama3.1"}


def published(file):
    """The settings in one of LLM2Vec's files."""
    settings, name = PUBLISHED[file]
    model, adapter, out = MODELS[name]
    folder = "mntp-simcse" if settings is SIMCSE else "mntp-supervised"
    return settings | {
        "model_name_or_path": model,
        "peft_model_name_or_path": adapter,
        "output_dir": f"output/{folder}/{out}",
    }


def run(settings, *flags):
    """Run in this process; the exit code."""
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings))
    return main(["simcse", str(path), *flags])


def write_rows(path, count, words=60, seed=0):
    """Write a file of queries, each with a positive and a hard negative."""
    rng = random.Random(f"{path.stem}{seed}")
    texts = [" ".join(f"w{rng.randrange(words)}" for _ in range(rng.randrange(3, 9))) for _ in range(count + 2)]
    rows = [{"query": a, "positive": b, "negative": c} for a, b, c in zip(texts, texts[1:], texts[2:])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_e5(folder, count=4, splits=False):
    """Write a folder in the layout of LLM2Vec's E5 data: a file a task, or in the older one. Returns the rows by task."""
    from bidirect_patch.cli.simcse.e5_instructions import E5_INSTRUCTIONS, E5_SPLITS

    tasks = E5_INSTRUCTIONS.keys() - (E5_SPLITS.values() if splits else E5_SPLITS.keys())
    folder.mkdir()
    return {task: write_rows(folder / f"{task}.jsonl", count) for task in sorted(tasks)}


def write_pairs(path, count=24, seed=0):
    """Write a file of pairs with scores: the more words two texts share, the higher."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        texts = [[rng.randrange(60) for _ in range(6)] for _ in range(2)]
        shared = rng.randrange(7)
        texts[1][:shared] = texts[0][:shared]
        one, two = (" ".join(f"w{i}" for i in words) for words in texts)
        rows.append({"sentence1": one, "sentence2": two, "score": shared / 6})
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


BAD_PAIRS = [  # a file of pairs, and what is said of it
    ("sentence1,sentence2\na,b\n", "has no column score; it has sentence1, sentence2"),
    ("sentence1,sentence2,score\na,b,high\nc,d,low\n", "row 1: two texts and a number are needed"),
    ("sentence1,sentence2,score\na,b,1\nc,,2\n", "row 2: two texts and a number are needed"),
    ("sentence1,sentence2,score\na,b,1\nc,d,1\n", "needs two different scores at least"),
]
