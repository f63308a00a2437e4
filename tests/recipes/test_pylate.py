"""The recipe of bidirect_patch/encoder/README.md for PyLate's ColBERT: it runs as it stands there.

Its vectors are those of an explicit mask, in batches and alone, and a trained one is saved and opened.
"""

import pytest
import torch

from bidirect_patch import enable_bidirectional, is_bidirectional

from ..helpers.explicit_masks import padded_masks, under
from ..helpers.heads import trainer_arguments
from ..helpers.paths import ROOT
from ..helpers.processes import in_a_new_process
from ..helpers.readme_blocks import NEEDS_AN_ENVIRONMENT, blocks
from ..helpers.sentences import write_folder

HOW = "pylate isn't installed, and needs an environment of its own: tox run -e pylate"
models = pytest.importorskip("pylate.models", reason=HOW, exc_type=ImportError)

GUIDE = ROOT / "bidirect_patch" / "encoder" / "README.md"
QUERIES = ["w1 w2", "w3", "w4 w5 w6 w7"]
DOCUMENTS = ["w1 w2 w3 w9 w10", "w7", "w20 w21 w22"]
CLOSE = dict(rtol=1e-4, atol=1e-5)
EXPANSIONS = {
    "none": dict(do_query_expansion=False),
    "attended": dict(attend_to_expansion_tokens=True, query_length=12),
}


def colbert(name, **settings):
    torch.manual_seed(0)
    return models.ColBERT(name, device="cpu", **{**EXPANSIONS["none"], **settings})


def encode(model, queries=(), documents=()):
    found = [model.encode(list(texts), is_query=is_query) for texts, is_query in ((queries, True), (documents, False)) if texts]
    return [torch.as_tensor(vectors) for one in found for vectors in one]


def test_the_recipe_runs_as_it_stands_in_the_guide(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / "model").rename(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (code,) = [code for _, code, _ in blocks(GUIDE.read_text()) if any(line in code for line in NEEDS_AN_ENVIRONMENT)]
    (tmp_path / "recipe.py").write_text(code + "\nprint([sorted(row['id'] for row in rows) for rows in ranked])\n")
    assert in_a_new_process(tmp_path / "recipe.py", cwd=tmp_path).splitlines()[-1] == "[['cat', 'rain'], ['cat', 'rain']]"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("expansion", EXPANSIONS.values(), ids=EXPANSIONS)
@pytest.mark.parametrize("sinks", [0, 1])
def test_vectors_of_tokens_are_those_of_an_explicit_mask_alone_and_in_batches(name, sinks, expansion, backend):
    model = colbert(name, model_kwargs={"attn_implementation": backend}, **expansion)
    twin = colbert(name, model_kwargs={"attn_implementation": "eager"}, **expansion)
    twin.load_state_dict(model.state_dict())  # PyLate adds tokens, whose embeddings are random
    enable_bidirectional(model, num_sink_tokens=sinks)
    for texts, is_query in ((QUERIES, True), (DOCUMENTS, False)):
        together = model.encode(texts, is_query=is_query)
        for text, found in zip(texts, together):
            torch.testing.assert_close(model.encode([text], is_query=is_query)[0], found, **CLOSE)
        batch = model.tokenize(texts, is_query=is_query)
        real, inner = batch["attention_mask"], twin[0].auto_model.eval()
        with torch.no_grad(), under(inner.layers, padded_masks(real, 2, sinks=sinks)):
            states = inner(input_ids=batch["input_ids"])[0]
            expected = torch.nn.functional.normalize(twin[1].linear(states), dim=-1)
        for row, kept, found in zip(expected, real.bool(), together):
            torch.testing.assert_close(torch.as_tensor(found), row[kept], **CLOSE)


def test_the_vector_of_a_sink_is_the_same_in_each_query_and_document(name):
    model = enable_bidirectional(colbert(name), num_sink_tokens=1)
    first = torch.stack([vectors[0] for vectors in encode(model, QUERIES, DOCUMENTS)])
    torch.testing.assert_close(first, first[:1].expand_as(first), **CLOSE)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(len(first)))  # so it adds 1 to each score


@pytest.mark.parametrize("sinks", [0, 1])
def test_it_is_trained_saved_and_opened(name, tmp_path, auto, sinks):
    from datasets import Dataset
    from pylate import losses, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = enable_bidirectional(colbert(name, query_length=8, document_length=8), num_sink_tokens=sinks)
    before = encode(model, QUERIES)
    rows = {
        "query": [f"w{i} w{i + 1}" for i in range(24)],
        "document": [f"w{i + 30} w{i + 31} w{i + 32}" for i in range(24)],
    }
    kept = ("report_to", "use_cpu", "disable_tqdm", "save_strategy", "dataloader_pin_memory")
    settings = {name: value for name, value in vars(trainer_arguments(tmp_path)).items() if name in kept}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "out"), **settings, logging_steps=1, max_steps=12, learning_rate=1e-2
        ),
        train_dataset=Dataset.from_dict(rows),
        loss=losses.Contrastive(model),
        data_collator=utils.ColBERTCollator(model.tokenize),
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    after = encode(model, QUERIES, DOCUMENTS)
    assert (after[0] - before[0]).abs().max() > 1e-3

    model.save_pretrained(str(tmp_path / "colbert"))
    opened = models.ColBERT(str(tmp_path / "colbert"), device="cpu")
    assert is_bidirectional(opened)
    for one, other in zip(after, encode(opened, QUERIES, DOCUMENTS), strict=True):
        torch.testing.assert_close(other, one, **CLOSE)
    one, other = encode(opened, ["w1 w2 w3", "w1 w2 w4"])
    moved = (one - other).abs().amax(-1) > 1e-4
    assert moved.tolist() == [not sinks, True, True, True, True]  # the first token, the prefix, and the words
