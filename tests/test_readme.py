"""The README and the guides: their Python blocks run as they stand and print what they show, and their links lead somewhere.

A guide is a README.md beside what it describes. The blocks of each file run from top to bottom, in a process of its own. Models
that a block loads by name are local folders of that name here: random weights, with SmolLM2's 30 layers in the first block of the
top README, which prints them, and 2 in all others.
"""

from pathlib import Path

import pytest
import torch
import transformers

import bidirect_patch
from bidirect_patch import enable_bidirectional

from .helpers.links import broken_links, relative_links
from .helpers.paths import ROOT
from .helpers.processes import in_a_new_process
from .helpers.readme_blocks import blocks, run
from .helpers.saved import lora

README = ROOT / "README.md"
FOLDERS = [ROOT / name for name in ("bidirect_patch", "benchmarks", "tests")]
PAGES = sorted([README, *(path for folder in FOLDERS for path in folder.rglob("*.md"))])
DEMO_MODEL = Path(bidirect_patch.__file__).parent / "demo_model"
GUIDES = [path for path in PAGES if path.name == "README.md" and path != README and path.parent.name != DEMO_MODEL.name]
WITH_BLOCKS = [path for path in (README, *GUIDES) if list(blocks(path.read_text()))]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZES = dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=64)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


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
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_the_python_blocks_run_and_print_what_they_show(page, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("sentence_transformers")
    for name, layers in {SMOLLM2: 30 if page == README else 2, "base": 2}.items():
        write_decoder(tmp_path / name, num_hidden_layers=layers, **SIZES)
    for name in ("mntp", "simcse", "adapter"):
        lora(enable_bidirectional(transformers.AutoModel.from_pretrained(tmp_path / "base"))).save_pretrained(tmp_path / name)
    script = Path(__file__).parent / "helpers" / "readme_blocks.py"
    smaller = (SMOLLM2, "base") if page == README else ()
    compared = in_a_new_process(script, page, *smaller, cwd=tmp_path, seconds=500).split()[-1]
    assert int(compared) == page.read_text().count("\n```text\n")  # each one follows the block that prints it


def test_the_readme_and_most_guides_have_blocks():
    assert README in WITH_BLOCKS and len(WITH_BLOCKS) > 4


@pytest.mark.parametrize("code, shown", [("print(1)", "2"), ("x", "x")], ids=["prints another thing", "fails"])
def test_a_block_that_does_not_do_what_it_shows_is_found(tmp_path, code, shown):
    (tmp_path / "README.md").write_text(f"```python\n{code}\n```\n\n```text\n{shown}\n```\n")
    with pytest.raises((SystemExit, NameError)):
        run(str(tmp_path / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert not broken_links(page)


def test_the_readme_names_every_guide_by_its_path():
    """Its links are relative, and where it stands on the package index they lead nowhere: there the words have to do."""
    links = [(shown, target.partition("#")[0]) for shown, target in relative_links(README.read_text())]
    assert {name_of(path) for path in GUIDES} <= {target for _, target in links}
    assert [shown for shown, target in links if target.endswith(".md") and shown != target] == []


BROKEN = {
    "no file": "[x](other.md)",
    "no figure": "![x](figures/none.svg)",
    "no heading here": "[x](#none)",
    "no heading there": "[x](guide/README.md#none)",
    "a heading in code": "[x](guide/README.md#a-comment)",
    "a heading of no Markdown file": "[x](picture.svg#a)",
    "the third of two": "[x](guide/README.md#twice-2)",
    "of a link around code": "[`x`](other.md)",
}
SOUND = {
    "an address": "[x](https://example.org/none#none)",
    "in code": "`[x](other.md)`",
    "in a block": "```python\na = b[x](other.md)\n```",
    "a folder": "[x](guide)",
    "a figure": "![x](picture.svg)",
    "a heading here": "[x](#top-a_bc-and-none)",
    "a heading there": "[x](guide/README.md#why-not-is_causalfalse-or-a-copy)",
    "a heading with a link": "[x](guide/README.md#see-here)",
    "the second of two": "[x](guide/README.md#twice-1)",
}


@pytest.mark.parametrize("line", [*BROKEN.values(), *SOUND.values()], ids=[*BROKEN, *SOUND])
def test_a_link_that_leads_nowhere_is_found(tmp_path, line):
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "README.md").write_text(
        "# Why not `is_causal=False`, or a copy?\n\n```bash\n# A comment\n```\n\n## See [here](x)\n\n## Twice\n\n## Twice\n"
    )
    (tmp_path / "picture.svg").write_text("<svg/>")
    (tmp_path / "README.md").write_text(f"# Top: `a_b.c`, and none\n\n{line}\n")
    assert bool(broken_links(tmp_path / "README.md")) == (line in BROKEN.values())
