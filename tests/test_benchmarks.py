"""The benchmarks run: each script imports, and the cheap ones print a table. What they measure is not tested."""

import importlib
import os
import pkgutil

import pytest
import torch
import transformers
from packaging.version import Version

import benchmarks
from bidirect_patch import disable_bidirectional, enable_bidirectional

from .helpers.tiny_models import tiny_config
from .helpers.versions import TRANSFORMERS

SCRIPTS = [m.name for m in pkgutil.iter_modules(benchmarks.__path__)]


@pytest.fixture(autouse=True)
def threads():
    """The scripts set one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "__main__"])
def test_a_script_imports_and_says_how_it_is_run(script):
    module = importlib.import_module(f"benchmarks.{script}")
    if hasattr(module, "main"):
        assert f"benchmarks.{script}" in module.__doc__ or f"benchmarks/{script}.py" in module.__doc__


def test_the_collators_table(capsys):
    importlib.import_module("benchmarks.collator").main(["--quick"])
    table = capsys.readouterr().out.splitlines()
    assert (
        table[0].split() == "| features | stock, million tokens / s | ours, million tokens / s | ours / stock |".split()
    )
    assert len(table) == 5  # a header, a line, and three kinds of features


@pytest.mark.skipif(
    Version("4.40") <= TRANSFORMERS < Version("5.2"),
    reason="neither a native switch nor the hand-written subclasses",
)
def test_the_patch_makes_what_its_peer_makes(capsys):
    """The script itself compares hidden states before it times anything."""
    module = importlib.import_module("benchmarks.patch_cost")
    module.step_cost(1, quick=True)
    assert capsys.readouterr().out.count("1 layer of 64") == 2


def test_tensors_that_operators_make_are_counted():
    module = importlib.import_module("benchmarks.patch_cost")
    with module.TensorCount() as counted:
        torch.ones(2) + 1
    assert counted.count == 2


def test_switching_makes_no_tensor():
    """Not the first time either: enabling reads weights no more than it copies them."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_config("llama"))
    module = importlib.import_module("benchmarks.patch_cost")
    with module.TensorCount() as made:
        disable_bidirectional(enable_bidirectional(model))
    assert made.count == 0


def test_padded_and_padding_free_batches_train_alike(capsys):
    """The script itself compares their losses before it times anything."""
    importlib.import_module("benchmarks.padding_free").main(["--quick"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[3].strip() == "100%" for row in rows] == [False, False, True, True]


@pytest.mark.parametrize("title", importlib.import_module("benchmarks.__main__").KEPT)
def test_measuring_again_keeps_what_other_commands_gave(title):
    kept = importlib.import_module("benchmarks.__main__").kept_sections
    section = f"{title}\n\nCard: H100.\n\n### Speed\n\n| a |\n"
    assert kept(f"# All\n\n## One\n\n{section}") == f"\n{section}"
    assert kept(f"{section}\n## Two\n") == f"\n{section}"
    assert kept(f"{title} and more\n") == kept("## One\n") == ""


def test_each_section_of_the_results_has_a_command_that_makes_it():
    module = importlib.import_module("benchmarks.__main__")
    with open(os.path.join(os.path.dirname(module.FIGURES), "RESULTS.md")) as file:
        titles = [line.strip().removeprefix("## ") for line in file if line.startswith("## ")]
    made = [section[0] for section in module.SECTIONS] + [title.removeprefix("## ") for title in module.KEPT]
    also = ("The patch against the peers, transformers", "Beside llm2vec 0.2.3", "Embeddings beside llm2vec 0.2.3")
    assert [title for title in titles if title not in made and not title.startswith(also)] == []
