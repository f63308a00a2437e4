"""LLM2Vec's steps at the paper's size on a real model: causal, bidirectional, + MNTP, + SimCSE, and SimCSE on the causal one.

1,000 steps of 32 x 512 tokens for MNTP and 1,000 of 128 x 32 for SimCSE, LoRA adapters, bfloat16 autocast. Where the time
won't do for all steps, the first ones tell how many it does for, the learning rate falls over those, and the row says so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu import carried, sts
from benchmarks.gpu.progress import LiveTable, Run
from benchmarks.gpu.shapes import RANK, clean
from benchmarks.gpu.timing import synchronized_clock

TIMED_STEPS = 20
POOLING = "mean"  # while SimCSE trains
LORA_DROPOUT = 0.05
SIMCSE_DROPOUT = 0.3  # of attention, LLM2Vec's
SCALE = 20.0  # of cosines, LLM2Vec's


@dataclass(frozen=True)
class Plan:
    """How long each step of the recipe is trained."""

    steps: int = 1000
    mntp_batch: int = 32
    mntp_length: int = 512
    simcse_batch: int = 128
    simcse_length: int = 32


DRY = Plan(steps=2, mntp_batch=2, mntp_length=16, simcse_batch=3, simcse_length=8)


@dataclass
class Trained:
    """What a training run came to."""

    steps: int
    seconds: float
    loss: float  # the mean of the last tenth


@dataclass
class Ladder:
    """What the rows share."""

    run: Run
    plan: Plan
    folder: Path  # of carried.unpacked
    tokenizer: Any
    table: LiveTable
    sets: list[str]

    def load(self, bidirectional: bool) -> Any:
        """The model as it was carried: a `*ForCausalLM` in bfloat16 on the device."""
        from transformers import AutoModelForCausalLM

        from bidirect_patch import enable_bidirectional

        model = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.bfloat16, local_files_only=True)
        model.config.use_cache = False
        model = model.to(self.run.device)
        return enable_bidirectional(model) if bidirectional else model

    def row(self, name: str, model: Any, trained: Trained | None = None) -> None:
        """Evaluate a model and write its rows, one for each pooling."""
        found = sts.evaluate(model.get_decoder(), self.folder, self.pad, self.run.device)
        how = (trained.steps, f"{trained.seconds:.0f}", f"{trained.loss:.3f}") if trained else ("", "", "")
        for pooling, scores in found.items():
            years = [score for name, score in scores.items() if name.startswith("sts20")]
            mean = f"{np.mean(years):.1f}" if years else ""
            self.table.add(name, pooling, *how, *[f"{scores[s]:.1f}" for s in self.sets], mean)

    @property
    def pad(self) -> int:
        """The id that padding has."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id


def part(run: Run) -> None:
    """Unpack what was carried, and write one row for each step."""
    if run.options.carried is None:
        run.write("\nLeft out: --carried PARTS, which --prepare writes, was not given.")
        return
    with carried.unpacked(Path(run.options.carried)) as folder:
        climb(run, folder, DRY if run.dry else Plan(steps=run.options.steps))


def climb(run: Run, folder: Path, plan: Plan) -> None:
    """The rows of the table, from what the folder holds."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    sets = sorted(file.stem.removeprefix("sts-") for file in folder.glob("sts-*.npz"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    columns = ("model", "pooling", "steps", "seconds", "last loss", *sets, "mean of STS12-16")
    ladder = Ladder(run, plan, folder, tokenizer, run.table(*columns), sets)
    rates = run.options.mntp_rate, run.options.simcse_rate

    steps = plan.steps
    causal = ladder.load(bidirectional=False)
    ladder.row("causal", causal)
    if run.allows("causal + SimCSE", 0 if run.dry else 60):
        trained = train_simcse(ladder, causal, rates[1], plan.steps, run.deadline.left() * 0.3)
        ladder.row("causal + SimCSE", causal, trained)
        steps = trained.steps  # the same for both
    del causal
    clean(run.device)

    model = ladder.load(bidirectional=True)
    ladder.row("bidirectional, untrained", model)
    if run.allows("+ MNTP", 0 if run.dry else 60):
        trained = train_mntp(ladder, model, rates[0], run.deadline.left() * 0.55)
        ladder.row("+ MNTP", model, trained)
    if run.allows("+ MNTP + SimCSE", 0 if run.dry else 30):
        trained = train_simcse(ladder, model, rates[1], steps, run.deadline.left() * 0.85)
        ladder.row("+ MNTP + SimCSE", model, trained)


def train_mntp(ladder: Ladder, model: Any, rate: float, seconds: float) -> Trained:
    """Masked next token prediction on rows cut from the text, for at most `seconds`; the adapter is merged at the end."""
    from bidirect_patch import MNTPCollator, apply_mntp_head
    from bidirect_patch.head import remove_mntp_head

    length, batch = ladder.plan.mntp_length, ladder.plan.mntp_batch
    line = carried.load_texts(ladder.folder / "paragraphs.npz").ids.astype(np.int64)
    rows = line[: len(line) // length * length].reshape(-1, length)
    collator = MNTPCollator(ladder.tokenizer, seed=0)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for chosen in shuffled(len(rows), batch):
            inputs = {name: x.to(ladder.run.device) for name, x in collator(list(rows[chosen])).items()}
            yield lambda inputs=inputs: model(**inputs).loss

    apply_mntp_head(model)
    try:
        return train(ladder.run, model, losses(), rate, ladder.plan.steps, seconds)
    finally:
        remove_mntp_head(model)


def train_simcse(ladder: Ladder, model: Any, rate: float, steps: int, seconds: float) -> Trained:
    """Each sentence twice under dropout, the rest of the batch as negatives, for at most `steps` and at most `seconds`."""
    sentences = carried.load_texts(ladder.folder / "sentences.npz")
    decoder, plan = model.get_decoder(), ladder.plan

    def loss(texts: list[np.ndarray]) -> Tensor:
        batch = sts.padded(texts + texts, ladder.pad, plan.simcse_length, ladder.run.device)
        vectors = sts.pooled(decoder(**batch).last_hidden_state, batch["attention_mask"], POOLING)
        one, other = nn.functional.normalize(vectors, dim=-1).chunk(2)
        return nn.functional.cross_entropy(SCALE * one @ other.T, torch.arange(len(one), device=one.device))

    def losses() -> Iterator[Callable[[], Tensor]]:
        for chosen in shuffled(len(sentences), plan.simcse_batch):
            yield lambda chosen=chosen: loss([sentences[i] for i in chosen])

    with_dropout = [m for m in decoder.modules() if hasattr(m, "attention_dropout")]
    for module in with_dropout:
        module.attention_dropout = SIMCSE_DROPOUT
    try:
        return train(ladder.run, model, losses(), rate, steps, seconds)
    finally:
        for module in with_dropout:
            module.attention_dropout = 0.0


def shuffled(count: int, batch: int) -> Iterator[np.ndarray]:
    """Batches of indices, epoch after epoch in a new order, without an end; the last, short one of an epoch is dropped.

    Raises:
        ValueError: There are fewer than a batch.
    """
    if count < batch:
        raise ValueError(f"{count} texts don't fill a batch of {batch}")
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(count)
        yield from (order[i : i + batch] for i in range(0, count - batch + 1, batch))


def train(
    run: Run, model: Any, losses: Iterator[Callable[[], Tensor]], rate: float, steps: int, seconds: float
) -> Trained:
    """Put a LoRA adapter on `model`, train it, and merge it. The learning rate falls to 0 in a straight line.

    Args:
        run: Whose device the model is on.
        model: A `*ForCausalLM`, changed in place.
        losses: For each step, what computes its loss.
        rate: The learning rate of the first step.
        steps: At most so many.
        seconds: What these may take. The first TIMED_STEPS are always trained, and say how many this does for.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=LORA_DROPOUT, target_modules="all-linear")
    adapted = get_peft_model(model, lora).train()
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=run.device.type == "cuda")
    clock = synchronized_clock(run.device)
    seen: list[Tensor] = []
    start = clock()
    for step, loss in enumerate(losses):
        if step == TIMED_STEPS // 2:  # the steps before it warm up
            timed_from = clock()
        if step == TIMED_STEPS:
            each = (clock() - timed_from) / (TIMED_STEPS - TIMED_STEPS // 2)
            steps = min(steps, step + max(0, int((seconds - (clock() - start)) / each)))
        if step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        with torch.autocast(run.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(value.detach())
    last = float(torch.stack(seen[-max(1, len(seen) // 10) :]).mean())
    took = clock() - start
    adapted.merge_and_unload()
    model.requires_grad_(True).eval()
    return Trained(len(seen), took, last)
