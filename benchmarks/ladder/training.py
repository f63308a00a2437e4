"""Training a row with this package's own commands, in a process each."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ladder.rows import ATTENTIONS, Row
from benchmarks.measure import ROOT
from bidirect_patch.cli.mntp.settings import PRESETS as MNTP_PRESETS
from bidirect_patch.cli.simcse.settings import PRESETS
from bidirect_patch.cli.sweep.model import Source

TOOK = "seconds.json"  # written beside a run when it is done: one without it is trained anew
MNTP_PRESET = MNTP_PRESETS["small"]
BATCH = PRESETS["small"]["per_device_train_batch_size"]
HELD_OUT = 64  # texts on which the loss of MNTP is taken along a curve

Settings = dict[str, Any]


class Plan(NamedTuple):
    """What all rows have in common.

    Attributes:
        source: The model.
        layers: So many of its first layers are kept.
        first_token: What stands before each text.
        out: The folder with `texts`, where the runs are kept too.
        steps: Of contrastive training and of distillation.
        mntp_layers: How many layers it is trained on. A head is made for the states after all layers.
        mntp_steps: Of masked next token prediction.
        mlm_probability: The share of tokens that it hides.
        tagging_steps: Of fine-tuned tagging.
        teacher: A finished encoder.
        bf16: Whether to compute in bfloat16.
        log: Is told what begins.
    """

    source: Source
    layers: int
    first_token: str
    out: Path
    steps: int
    mntp_layers: int
    mntp_steps: int
    mlm_probability: float
    tagging_steps: int
    teacher: str | None
    bf16: bool
    log: Callable[[str], None]


def model_settings(plan: Plan, row: Row) -> Settings:
    """The settings of a row's model, before any training, as both commands and `EncoderArguments` have them."""
    attention = ATTENTIONS[row.attention]
    own = {"model_name_or_path": plan.source.name, "layers": plan.layers, "sink_token": plan.first_token}
    sinks = {"num_sink_tokens": attention.sinks, "num_sinkless_layers": attention.blind}
    return own | plan.source.options | sinks


def run_settings(plan: Plan, row: Row) -> Settings:
    """The settings that every run of a command has."""
    common = {"preset": "small", "lr_scheduler_type": "linear", "save_strategy": "no", "report_to": "none"}
    return common | model_settings(plan, row) | {"bf16": plan.bf16, "seed": row.seed}


def trained(plan: Plan, row: Row) -> dict[str, str]:
    """Train the row, unless that is done: the folder of each step by its name, the last step last."""
    folders: dict[str, str] = {}
    for step in row.steps:
        before = Row("MNTP" if step == "mntp" else row.recipe, row.attention, row.seed)  # of which rows share the first step
        folder = plan.out / "trained" / before.file
        settings = run_settings(plan, row) | on_adapter(folders)
        if step == "halved":
            _halve(folders["mntp"], folder)
        else:
            command, own = _of_step(plan, row, step)
            run(command, settings | own | {"max_steps": plan.mntp_steps if step == "mntp" else plan.steps}, folder, plan.log)
        folders[step] = str(folder)
    return folders


def checkpoints(plan: Plan, row: Row, every: int, count: int) -> Path:
    """Train the one step of a row, with a checkpoint after `every` steps, `count` of them: the folder of the run.

    The learning rate stays what it is, so that no checkpoint depends on where the run ends. MNTP is evaluated on texts held out,
    too, before it begins and at each checkpoint.
    """
    (step,) = row.steps
    folder = plan.out / "curve" / "trained" / row.file
    command, own = _of_step(plan, row, step)
    settings = run_settings(plan, row) | own | {"max_steps": every * count, "logging_steps": every}
    settings["lr_scheduler_type"] = "constant_with_warmup"
    settings |= {"save_strategy": "steps", "save_steps": every, "save_only_model": True, "save_total_limit": None}
    if step == "mntp":
        settings |= {"validation_split_percentage": 5, "max_eval_samples": HELD_OUT, "do_eval": True}
        settings |= {"eval_strategy": "steps", "eval_steps": every}
    run(command, settings, folder, plan.log)
    return folder


def tokens_a_step(plan: Plan, row: Row, tokenizer: Any) -> float:
    """How many tokens a step of the row's training reads."""
    (step,) = row.steps
    if step == "mntp":
        return float(MNTP_PRESET["max_seq_length"] * MNTP_PRESET["per_device_train_batch_size"])
    lines = Path(_of_contrast(plan, row, step)["dataset_file_path"]).read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines for text in (json.loads(line).values() if step == "neighbours" else (line, line))]
    ids = tokenizer(texts, truncation=True, max_length=PRESETS["small"]["max_seq_length"])["input_ids"]
    return 2 * BATCH * sum(map(len, ids)) / len(ids)


def on_adapter(folders: dict[str, str]) -> Settings:
    """The setting by which a run begins at the adapter of the last step before it, which gives one; empty if there is none."""
    return {"peft_model_name_or_path": list(folders.values())[-1]} if folders else {}


def _halve(adapter: str, folder: Path) -> None:
    """Copy an adapter of LoRA, at half its strength: merged, it gives the mean of the weights before and after its training."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] // 2}), encoding="utf-8")


def _of_step(plan: Plan, row: Row, step: str) -> tuple[str, Settings]:
    """The command of a step of training, and the settings that are its own."""
    return ("mntp", _of_mntp(plan)) if step == "mntp" else ("simcse", _of_contrast(plan, row, step))


def _of_mntp(plan: Plan) -> Settings:
    file = str(plan.out / "texts" / "paragraphs.txt")
    return {"train_file": [file], "layers": plan.mntp_layers, "mlm_probability": plan.mlm_probability}


def _of_contrast(plan: Plan, row: Row, step: str) -> Settings:
    texts = plan.out / "texts"
    file = texts / ("neighbours.jsonl" if step == "neighbours" else "sentences.txt")
    bidirectional = ATTENTIONS[row.attention].bidirectional
    # In a causal model the later tokens know more of the text.
    settings: Settings = {
        "dataset_file_path": str(file),
        "bidirectional": bidirectional,
        "pooling_mode": "mean" if bidirectional else "weighted_mean",
    }
    if step == "teacher":
        return settings | {"teacher": plan.teacher, "max_train_samples": BATCH * plan.steps}
    return settings | {"loss_scale": 20.0}


def run(command: str, settings: Settings, folder: Path, log: Callable[[str], None]) -> None:
    """`bidirect-patch COMMAND` with these settings, unless the folder holds its result already.

    Raises:
        RuntimeError: The command failed.
    """
    done = folder.with_suffix(f".{TOOK}")
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(settings | {"output_dir": str(folder), "overwrite_output_dir": True, "do_train": True}))
    log(f"{command} -> {folder.name}")
    start = time.monotonic()
    with open(folder.with_suffix(".log"), "w") as output:
        line = (sys.executable, "-m", "bidirect_patch", command, str(file))
        code = subprocess.run(line, env=os.environ | {"PYTHONPATH": ROOT}, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{command} failed with {code}: see {folder.with_suffix('.log')}")
    done.write_text(json.dumps(time.monotonic() - start))
