"""A patched model is a `Transformer` module of sentence-transformers like any other: encode, save, load, train."""

import json
from pathlib import Path

import pytest
import torch

from bidirect_patch import enable_bidirectional, is_bidirectional

from .helpers.one_text import reaches_back
from .helpers.sentences import write_folder
from .helpers.versions import lacks_add_adapter

st = pytest.importorskip("sentence_transformers", "6", reason="sentence-transformers 6 or newer isn't installed")

TEXTS = ["w1 w2 w3 w4", "w5", "w6 w7 w8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("peft", reason="the folder holds an adapter")
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder)
    return folder


@pytest.fixture
def encoder(place):
    model = st.SentenceTransformer(str(place / "model"), device="cpu")
    model.tokenizer.pad_token = model.tokenizer.eos_token
    return model


def test_one_line_makes_it_bidirectional_and_padding_changes_nothing(encoder):
    causal = encoder.encode(TEXTS)
    assert enable_bidirectional(encoder) is encoder
    both = encoder.encode(TEXTS)
    assert is_bidirectional(encoder) and reaches_back(encoder[0].model)
    assert abs(both - causal).max() > 1e-3
    torch.testing.assert_close(
        torch.tensor(encoder.encode(TEXTS, batch_size=1)), torch.tensor(both), rtol=1e-4, atol=1e-5
    )


def test_saved_and_loaded_it_encodes_the_same(encoder, tmp_path):
    want = enable_bidirectional(encoder).encode(TEXTS)
    encoder.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    opened = st.SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(torch.tensor(opened.encode(TEXTS)), torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_an_adapter_on_it_saves_and_loads(encoder, tmp_path, auto):
    peft = pytest.importorskip("peft")
    if reason := lacks_add_adapter():
        pytest.skip(reason)

    torch.manual_seed(0)
    enable_bidirectional(encoder)
    encoder.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    want = encoder.encode(TEXTS)
    encoder.save_pretrained(str(tmp_path))
    opened = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert is_bidirectional(opened)
    torch.testing.assert_close(torch.tensor(opened.encode(TEXTS)), torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_its_trainer_trains_it(encoder, tmp_path):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    enable_bidirectional(encoder)
    before = encoder.encode(TEXTS)
    data = datasets.Dataset.from_dict(
        {"anchor": [f"w{i} w{i + 1}" for i in range(8)], "positive": [f"w{i}" for i in range(8)]}
    )
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(encoder)
    trainer = st.SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert abs(encoder.encode(TEXTS) - before).max() > 1e-3 and is_bidirectional(encoder)
    assert json.loads(Path(tmp_path, "trained", "config.json").read_text())["is_causal"] is False
