"""Every Python block of the README runs as it stands, from top to bottom, and prints what the block after it shows.

Models that a block loads by name are local folders of that name here: random weights, SmolLM2's sizes where a size is printed.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch
import transformers

import bidirect_patch

ROOT = Path(__file__).parent.parent
DEMO_MODEL = Path(bidirect_patch.__file__).parent / "demo_model"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
same_output = doctest.OutputChecker().check_output

pytestmark = pytest.mark.slow


def blocks():
    """(line, code, what it prints or None) of each Python block."""
    text = (ROOT / "README.md").read_text()
    found = list(BLOCK.finditer(text))
    for block, after in zip(found, [*found[1:], None]):
        if block[1] == "python":
            shown = after and after[1] == "text" and not text[block.end() : after.start()].strip()
            yield text[: block.start()].count("\n") + 2, block[2], after[2] if shown else None


def decoder(folder, **sizes):
    """A random Llama with the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with what the README loads by name."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30, intermediate_size=64)
    decoder(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct", **sizes)
    return tmp_path


def test_the_python_blocks_run_and_print_what_the_readme_shows(folder):
    pytest.importorskip("sentence_transformers")
    names = {"__name__": "__main__"}
    compared = 0
    for line, code, shown in blocks():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), names)
        if shown is not None:
            compared += 1
            assert same_output(shown, printed.getvalue(), doctest.ELLIPSIS), (
                f"README line {line} prints:\n{printed.getvalue()}\nand the README shows:\n{shown}"
            )
    assert compared > 2
