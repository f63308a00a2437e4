"""The recipes of bidirect_patch/encoder/README.md for MultiVectorEncoder and CrossEncoder.

Each is trained, saved and opened, and gives the same in batches and alone.
"""

import pytest
import torch
from packaging.version import Version

from bidirect_patch import enable_bidirectional

from ..helpers.explicit_masks import sink_masks, under
from ..helpers.heads import trainer_arguments
from ..helpers.versions import TRANSFORMERS

st = pytest.importorskip("sentence_transformers", "5.4", reason="sentence-transformers 5.4 or newer isn't installed")
pytest.importorskip("peft", reason="the folder holds an adapter")
datasets = pytest.importorskip("datasets", reason="the recipes train on a data set")
modules = pytest.importorskip("sentence_transformers.base.modules")

QUERIES = ["w1 w2", "w3", "w4 w5 w6 w7"]
DOCUMENTS = ["w1 w2 w3 w9 w10", "w7", "w20 w21 w22"]
CLOSE = dict(rtol=1e-4, atol=1e-5)
multi_vectors = pytest.mark.skipif(not hasattr(st, "MultiVectorEncoder"), reason="sentence-transformers has it from 6 on")
trains = pytest.mark.skipif(
    TRANSFORMERS < Version("4.46"), reason="the trainer of sentence-transformers needs transformers 4.46"
)


def multi_vector(name, num_sink_tokens=0):
    torch.manual_seed(0)
    model = st.MultiVectorEncoder(name, device="cpu")
    model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    if num_sink_tokens:
        from bidirect_patch.encoder.without_sinks import WithoutSinks

        model.insert(1, WithoutSinks(num_sink_tokens))
    return enable_bidirectional(model, num_sink_tokens=num_sink_tokens)


def cross(name):
    torch.manual_seed(0)
    text = modules.Transformer(name, transformer_task="sequence-classification", config_kwargs={"num_labels": 1})
    text.tokenizer.pad_token = text.tokenizer.pad_token or text.tokenizer.eos_token
    text.model.config.pad_token_id = text.tokenizer.pad_token_id
    return enable_bidirectional(st.CrossEncoder(modules=[text], device="cpu"))


def arguments(kind, folder, **settings):
    kept = ("report_to", "use_cpu", "disable_tqdm", "save_strategy")
    plain = {name: value for name, value in vars(trainer_arguments(folder)).items() if name in kept}
    return kind(str(folder), **plain, logging_steps=1, **settings)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@multi_vectors
@pytest.mark.parametrize("sinks", [0, 1])
def test_vectors_of_tokens_are_those_of_an_explicit_mask_alone_and_in_batches(name, sinks):
    model = multi_vector(name, sinks)
    twin = modules.Transformer(name, model_kwargs={"attn_implementation": "eager"}).model.eval()
    (dense,) = [module for module in model if isinstance(module, modules.Dense)]
    together = model.encode_document(DOCUMENTS)
    for text, found in zip(DOCUMENTS, together):
        torch.testing.assert_close(model.encode_document([text])[0], found, **CLOSE)
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad(), under(twin.layers, sink_masks(ids.shape[1], 2, sinks=sinks)):
            states = twin(input_ids=ids)[0][0, sinks:]
        expected = torch.nn.functional.normalize(states @ dense.linear.weight.T, dim=-1)
        assert len(found) == len(text.split()) + 1 - sinks
        torch.testing.assert_close(torch.as_tensor(found), expected.detach(), **CLOSE)


@multi_vectors
@pytest.mark.parametrize("sinks", [0, 1])
def test_late_interaction_is_trained_saved_and_opened(name, tmp_path, auto, sinks):
    from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss

    model = multi_vector(name, sinks)
    before = model.encode_query(QUERIES)
    rows = {
        "query": [f"w{i} w{i + 1}" for i in range(24)],
        "document": [f"w{i + 30} w{i + 31} w{i + 32}" for i in range(24)],
    }
    trainer = MultiVectorEncoderTrainer(
        model=model,
        args=arguments(MultiVectorEncoderTrainingArguments, tmp_path / "out", max_steps=12, learning_rate=1e-2),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=MultiVectorMultipleNegativesRankingLoss(model),
    )
    found = losses(trainer)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    queries, documents = model.encode_query(QUERIES), model.encode_document(DOCUMENTS)
    assert (torch.as_tensor(queries[0]) - torch.as_tensor(before[0])).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "late"))
    opened = st.MultiVectorEncoder(str(tmp_path / "late"), device="cpu")
    for one, other in zip([*queries, *documents], [*opened.encode_query(QUERIES), *opened.encode_document(DOCUMENTS)]):
        torch.testing.assert_close(other, one, **CLOSE)
    scores = opened.similarity(opened.encode_query(QUERIES), opened.encode_document(DOCUMENTS))
    assert scores.shape == (3, 3)
    one, other = (opened.encode_query([text])[0] for text in ("w1 w2 w3", "w1 w2 w4"))
    first = 1 - sinks  # the first word's vector, which sees the last one
    assert (torch.as_tensor(one[first]) - torch.as_tensor(other[first])).abs().max() > 1e-4


@trains
def test_a_reranker_is_trained_saved_and_opened(name, tmp_path, auto):
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = cross(name)
    rows = {"query": [f"w{i} </s>" for i in range(24)], "document": [f"w{i if i % 2 else 59 - i}" for i in range(24)]}
    rows["label"] = [float(i % 2) for i in range(24)]
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments(CrossEncoderTrainingArguments, tmp_path / "out", max_steps=30, learning_rate=1e-2),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=BinaryCrossEntropyLoss(model),
    )
    found = losses(trainer)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    pairs = list(zip((f"{query} </s>" for query in QUERIES), DOCUMENTS))
    scores = model.predict(pairs)
    assert max(abs(model.predict([pair])[0] - score) for pair, score in zip(pairs, scores)) < 1e-5
    model.save_pretrained(str(tmp_path / "reranker"))
    opened = st.CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    torch.testing.assert_close(torch.tensor(opened.predict(pairs)), torch.tensor(scores), **CLOSE)
    inner = opened[0].model.model.eval()
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 6, 8]])
    with torch.no_grad():
        states = inner(input_ids=ids)[0]
    assert not torch.equal(states[0, 0], states[1, 0])
