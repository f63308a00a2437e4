"""What each of two ranks does for test_engines: rank 0 writes the mean loss and the whole
gradients of each engine."""

import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from bidirect_patch import apply_mntp_head, enable_bidirectional

from .tiny_models import tiny_model
from .training_step import BATCH, IDS, LEARNING_RATE, gradients, loss_and_gradients


def data_parallel(folder, half):
    model = apply_mntp_head(tiny_model()).train()
    return loss_and_gradients(model, torch.nn.parallel.DistributedDataParallel(model), half)


def sharded(folder, half):
    model = apply_mntp_head(tiny_model()).train()
    for layer in model.model.layers:
        fully_shard(layer)
    return loss_and_gradients(model, fully_shard(model), half)


def accelerated(folder, half):
    """A script of Trainer with one line added; what `accelerate launch` was told makes it FSDP. Saves after a step."""
    rows = [{name: value[i] for name, value in BATCH.items()} for i in range(len(IDS))]  # dealt out to the ranks
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    model = enable_bidirectional(model)  # the line
    arguments = TrainingArguments(
        output_dir=f"{folder}/trained",
        per_device_train_batch_size=2,
        max_steps=1,
        logging_steps=1,
        learning_rate=LEARNING_RATE,
        optim="sgd",
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    found = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model, **kwargs):
            found.update(gradients(model))

    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[Look()]
    )
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer.model_wrapped, FSDPModule)
    return torch.tensor(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)), found


def main(folder):
    # accelerate takes a CPU for no device to shard on; told that it is one, it does there what it does on others.
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_XPU)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    half = {name: value[2 * rank : 2 * rank + 2] for name, value in BATCH.items()}
    if rank == 0:
        tiny_model().save_pretrained(f"{folder}/model")
    dist.barrier()
    for engine in (data_parallel, sharded, accelerated):
        loss, found = engine(folder, half)
        dist.all_reduce(loss)
        if rank == 0:
            torch.save((loss / 2, found), f"{folder}/{engine.__name__}")
    dist.barrier()
    os._exit(0)  # gloo's threads abort or hang once in some ten times when a process group is destroyed


if __name__ == "__main__":
    main(sys.argv[1])
