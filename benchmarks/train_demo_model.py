"""Train the tiny causal Llama that `bidirect-patch demo` starts from.

    python benchmarks/train_demo_model.py [--steps 1400] [--seed 0] [--output-dir bidirect_patch/demo_model]

Its text is on every machine that has Python: the docstrings of the standard library and the language reference behind
`help()` (`pydoc_data.topics`), less the topics that the demo evaluates on and every paragraph that these share with
another text. One thread, a few CPU minutes; the same Python, libraries and seed give the same weights.
"""

import argparse
import ast
import json
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from bidirect_patch.cli.demo import SHIPPED, held_out_and_training_topics, paragraphs

END = "<|endoftext|>"
LENGTH, BATCH = 128, 16
CONFIG = {  # the names of transformers 4.39, which later ones still read
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float16",
}


def docstrings() -> list[str]:
    """Every distinct docstring of the standard library, read from its source and not by importing it."""
    library = Path(sysconfig.get_path("stdlib"))
    elsewhere = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        if elsewhere.isdisjoint(path.relative_to(library).parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= dict.fromkeys(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, so that no text has an unknown token, and `_` is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_line(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts on one line, (tokens,), int64, an end token after each."""
    ids = [encoding.ids + [CONFIG["eos_token_id"]] for encoding in tokenizer.encode_batch(texts)]
    return torch.tensor([i for text in ids for i in text])


def train(line: torch.Tensor, steps: int, generator: torch.Generator) -> LlamaForCausalLM:
    """Next token prediction on random crops of `line`."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    for step in range(steps):
        starts = torch.randint(len(line) - LENGTH, (BATCH, 1), generator=generator)
        ids = line[starts + torch.arange(LENGTH)]  # (BATCH, LENGTH)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5}  loss {loss.item():.3f}  {time.process_time():.0f} CPU seconds", flush=True)
    return model.eval()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, line: torch.Tensor) -> float:
    """Mean next-token loss in nats over consecutive chunks of LENGTH tokens."""
    chunks = line[: len(line) // LENGTH * LENGTH].view(-1, LENGTH)
    return sum(model(input_ids=c[None], labels=c[None]).loss.item() for c in chunks) / len(chunks)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what any transformers from 4.39 on opens: plain fields, and merges as tokenizers before 0.20 read them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.half().contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    (folder / "model.safetensors").write_bytes(to_safetensors(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", CONFIG, indent=2)
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    write_json(folder / "tokenizer.json", state)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    settings |= {"model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}  # older releases of transformers add token types
    write_json(folder / "tokenizer_config.json", settings, indent=2)


def write_json(path: Path, value: dict, **how) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, **how) + "\n", encoding="utf-8")


CARD = """# A tiny causal Llama, for `bidirect-patch demo`

It is here to be adapted in a minute on any machine, and is of no other use.

- {parameters:,} parameters in float16: {num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads \
sharing {num_key_value_heads} key-value heads, byte-level BPE of {vocab_size} tokens, up to \
{max_position_embeddings} positions (trained at {length}).
- Trained for next token prediction, causally and from scratch, on {tokens:,} tokens: the docstrings of the standard \
library and the language reference (`pydoc_data.topics`) of Python {python}, which are Python's, under its license.
- {steps} steps of {batch} x {length} tokens ({epochs:.1f} passes), seed {seed}, {seconds:.0f} CPU seconds on one \
thread; transformers {transformers}, torch {torch}.
- Next-token loss on the topics held out ({held_out}; paragraphs that other texts share with them were left out of \
training): {loss:.3f} nats a token, {bits:.2f} bits a byte. On its training text: {training_loss:.3f} nats a token.
- Made by `python benchmarks/train_demo_model.py --steps {steps} --seed {seed}` in the project's repository.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=SHIPPED)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(settings.seed)

    held_out, topics = held_out_and_training_topics()
    secret = {paragraph for text in held_out for paragraph in paragraphs(text)}
    texts = topics + [text for text in docstrings() if secret.isdisjoint(paragraphs(text))]
    random.Random(settings.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    line, unseen = token_line(tokenizer, texts), token_line(tokenizer, held_out)
    print(f"{len(line):,} tokens to train on, {len(unseen):,} held out", flush=True)
    model = train(line, settings.steps, generator)
    save(model, tokenizer, settings.output_dir)
    shipped = LlamaForCausalLM.from_pretrained(settings.output_dir, torch_dtype=torch.float32).eval()
    loss = evaluate(shipped, unseen)
    card = CARD.format(
        **CONFIG,
        parameters=sum(p.numel() for p in shipped.parameters()),
        length=LENGTH,
        batch=BATCH,
        tokens=len(line),
        python=platform.python_version(),
        steps=settings.steps,
        epochs=settings.steps * BATCH * LENGTH / len(line),
        seed=settings.seed,
        seconds=time.process_time(),
        transformers=transformers.__version__,
        torch=torch.__version__,
        held_out=f"{len(unseen):,} tokens",
        loss=loss,
        bits=loss / math.log(2) * len(unseen) / sum(len(text.encode()) for text in held_out),
        training_loss=evaluate(shipped, line[: len(unseen)]),
    )
    (settings.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
