"""Running a training command, and reading what it leaves."""

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoTokenizer

from bidirect_patch.cli import main


def run(settings, *flags, command="mntp"):
    """Run in this process; the exit code."""
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings))
    return main([command, str(path), *flags])


def results(settings):
    return json.loads((Path(settings["output_dir"]) / "all_results.json").read_text())


def weights(settings, name="adapter_model.safetensors"):
    return load_file(Path(settings["output_dir"]) / name)


def batches(settings, collator, lengths, size=8):
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    lines = Path(settings["validation_file"]).read_text().splitlines()
    rows = [tokenizer(line, truncation=True, max_length=lengths)["input_ids"] for line in lines if line]
    return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def refused(capsys, settings, *flags, command="mntp"):
    """The error of a run that is refused before anything is made."""
    said = error_line(capsys, settings, *flags, command=command)
    assert not Path(settings["output_dir"]).exists()
    return said


def error_line(capsys, settings, *flags, command="mntp"):
    assert run(settings, *flags, command=command) == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("bidirect-patch: error: ")]
    assert len(said) == 1 and said[0] == lines[-1] and "Traceback" not in "".join(lines)
    return said[0]
