"""Training a row with this package's own commands, in a process each, and opening what they wrote."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ladder.plan import NEIGHBOURS, PUBLISHED, Row, Scale, Settings
from benchmarks.measure import ROOT

TOOK = "seconds.json"  # written when a run is done: a folder without it is trained anew


def run_command(command: str, settings: Settings, folder: Path, log: Callable[[str], None]) -> None:
    """`bidirect-patch COMMAND` with these settings, unless the folder holds its result already.

    Raises:
        RuntimeError: The command failed.
    """
    if (folder / TOOK).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(settings | {"output_dir": str(folder), "overwrite_output_dir": True, "do_train": True}))
    log(f"{command} -> {folder.name}")
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with open(folder.with_suffix(".log"), "w") as output:
        line = (sys.executable, "-m", "bidirect_patch", command, str(file))
        code = subprocess.run(line, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{command} failed with {code}: see {folder.with_suffix('.log')}")
    (folder / TOOK).write_text(json.dumps(time.monotonic() - start))


class Trainer:
    """Trains the rows of a scale.

    Args:
        scale: The settings.
        model: The folder of the model that is trained.
        texts: The folder with paragraphs.txt, sentences.txt and neighbours.jsonl.
        work: Where the runs are kept.
        log: Is told what begins.
    """

    def __init__(self, scale: Scale, model: Path, texts: Path, work: Path, log: Callable[[str], None]) -> None:
        self.scale, self.model, self.texts, self.work, self.log = scale, model, texts, work, log

    def mntp(self, seed: int) -> Path:
        """The adapter of masked next token prediction."""
        return self.mntp_changed(str(seed), {"seed": seed})

    def mntp_changed(self, name: str, change: Settings) -> Path:
        """The same with some settings changed, in a folder of that name."""
        settings = {"model_name_or_path": str(self.model), "train_file": [str(self.texts / "paragraphs.txt")]}
        folder = self.mntp_folder(name)
        run_command("mntp", self.scale.mntp | settings | change, folder, self.log)
        return folder

    def mntp_folder(self, name: str) -> Path:
        """Where a run of masked next token prediction is kept, by its seed or by what was changed."""
        return self.work / f"mntp-{_words(name)}"

    def simcse(self, row: Row, seed: int) -> Path:
        """The encoder of a row, all its adapters merged."""
        settings = {
            "model_name_or_path": str(self.model),
            "dataset_file_path": str(self.texts / "sentences.txt"),
            "bidirectional": row.bidirectional,
            "max_steps": row.simcse,
            "seed": seed,
        }
        if row.mntp:
            settings["peft_model_name_or_path"] = str(self.mntp(seed))
        folder = self._folder(row, seed)
        if row.neighbours:
            settings |= NEIGHBOURS | {"dataset_file_path": str(self.texts / "neighbours.jsonl")}
        published = PUBLISHED if row.published else {}
        run_command("simcse", self.scale.simcse | published | settings, folder, self.log)
        return folder

    def seconds(self, row: Row, seeds: int) -> float:
        """How long a row's training took, on average over those seeds that are done. NaN: none is."""
        took = [self._took(row, seed) for seed in range(seeds)]
        done = [seconds for seconds in took if seconds is not None]
        return sum(done) / len(done) if done else math.nan

    def _took(self, row: Row, seed: int) -> float | None:
        folders = [self.mntp_folder(str(seed))] * row.mntp + [self._folder(row, seed)] * (row.simcse > 0)
        if not all((folder / TOOK).exists() for folder in folders):
            return None
        return sum(json.loads((folder / TOOK).read_text()) for folder in folders)

    def _folder(self, row: Row, seed: int) -> Path:
        return self.work / f"{_words(row.name)}-{seed}"

    def decoder(self, row: Row, seed: int, whole_model: Path) -> tuple[Any, Any]:
        """The trained decoder of a row, in eval mode, and its tokenizer."""
        from peft import PeftModel
        from transformers import AutoModel, AutoTokenizer

        from bidirect_patch import assert_bidirectional, disable_bidirectional, enable_bidirectional

        folder = self.simcse(row, seed) if row.simcse else whole_model if row.whole else self.model
        model = AutoModel.from_pretrained(folder)
        if not row.bidirectional:
            disable_bidirectional(model)
        else:
            enable_bidirectional(model)
            if row.mntp and not row.simcse:
                model = PeftModel.from_pretrained(model, self.mntp(seed)).merge_and_unload()
            assert_bidirectional(model)
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def _words(name: str) -> str:
    """A name as a folder has it."""
    return "-".join(re.findall(r"\w+", name.replace("+", "and").replace("'", "")))


def open_encoder(folder: Path) -> tuple[Any, Any]:
    """A finished encoder as it is, in eval mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
