"""Every Python block of the README runs as it stands, from top to bottom, and prints what the block after it shows.

Models that a block loads by name are local folders of that name here: random weights, with SmolLM2's 30 layers in the first
block, which prints them, and 2 after it.
"""

from pathlib import Path

import pytest
import torch
import transformers

import bidirect_patch
from bidirect_patch import enable_bidirectional

from .helpers.processes import in_a_new_process
from .helpers.readme_blocks import run
from .helpers.saved import lora

ROOT = Path(__file__).parent.parent
DEMO_MODEL = Path(bidirect_patch.__file__).parent / "demo_model"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZES = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=64)


def write_decoder(folder, **sizes):
    """A random Llama with the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_python_blocks_run_and_print_what_the_readme_shows(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("sentence_transformers")
    for name, layers in {SMOLLM2: 30, "base": 2}.items():
        write_decoder(tmp_path / name, num_hidden_layers=layers, **SIZES)
    for name in ("mntp", "simcse", "adapter"):
        lora(enable_bidirectional(transformers.AutoModel.from_pretrained(tmp_path / "base"))).save_pretrained(tmp_path / name)
    script = Path(__file__).parent / "helpers" / "readme_blocks.py"
    compared = in_a_new_process(script, ROOT / "README.md", SMOLLM2, "base", cwd=tmp_path, seconds=500).split()[-1]
    assert int(compared) > 4


@pytest.mark.parametrize("code, shown", [("print(1)", "2"), ("x", "x")], ids=["prints another thing", "fails"])
def test_a_block_that_does_not_do_what_it_shows_is_found(tmp_path, code, shown):
    (tmp_path / "README.md").write_text(f"```python\n{code}\n```\n\n```text\n{shown}\n```\n")
    with pytest.raises((SystemExit, NameError)):
        run(str(tmp_path / "README.md"))
