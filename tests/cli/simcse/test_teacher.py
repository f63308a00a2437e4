"""Distillation from a finished encoder, `simcse --teacher`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bidirect_patch import enable_bidirectional
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.checkpoints.marks import sinks_on_disk

from ...helpers.simcse_runs import run

st = pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")

WIDTH = 12


@pytest.fixture(scope="module")
def teacher(place, tmp_path_factory):
    """A folder with an encoder of 12 numbers: each word has its own vector, and a text the mean of its words'."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    words = StaticEmbedding(AutoTokenizer.from_pretrained(place / "model"), embedding_dim=WIDTH)
    folder = str(tmp_path_factory.mktemp("teacher"))
    st.SentenceTransformer(modules=[words], device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture
def distilled(settings, teacher):
    """Several passes over the texts of the fixture."""
    del settings["simcse_dropout"], settings["loss_scale"]
    several = {"stop_after_n_steps": 60, "num_train_epochs": 15, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"}
    return settings | several | {"teacher": teacher, "gradient_checkpointing": False, "peft_model_name_or_path": None}


def texts_of(settings):
    return [line for line in Path(settings["dataset_file_path"]).read_text().splitlines() if line]


def likeness(settings):
    """The mean cosine of the trained encoder's embeddings with the teacher's."""
    with opening_sinks():
        encoder = st.SentenceTransformer(settings["output_dir"], device="cpu")
    enable_bidirectional(encoder, **sinks_on_disk(settings["output_dir"])._asdict())
    teacher = st.SentenceTransformer(settings["teacher"], device="cpu")
    one, two = (model.encode(texts_of(settings), convert_to_tensor=True) for model in (encoder, teacher))
    assert one.shape == two.shape == (64, WIDTH)
    return float(torch.cosine_similarity(one, two).mean())


def logged(settings):
    history = json.loads(Path(settings["output_dir"], "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_embeddings_come_near_the_teachers_and_are_as_long(distilled):
    assert run(distilled | {"num_sink_tokens": 1}) == 0
    losses = logged(distilled)
    assert losses[0] < 0.5 and losses[-1] < 0.2
    assert likeness(distilled) > 0.8
    card = Path(distilled["output_dir"], "README.md").read_text()
    assert "single texts" in card and "towards the embeddings of `" in card


@pytest.fixture
def projected(monkeypatch):
    """The weight of the linear layer and its output, at each of its forwards."""
    from sentence_transformers.base.modules import Dense

    seen = []
    forward = Dense.forward

    def recorded(self, features):
        features = forward(self, features)
        seen.append((self.linear.weight.detach().clone(), features["sentence_embedding"].detach()))
        return features

    monkeypatch.setattr(Dense, "forward", recorded)
    return seen


def test_the_first_loss_is_one_minus_the_cosine_with_the_teachers_embeddings(distilled, ids_read, projected):
    assert run(distilled | {"stop_after_n_steps": 1}) == 0
    first, count = projected[0][1], distilled["per_device_train_batch_size"]
    texts = [" ".join(f"w{i - 3}" for i in ids) for ids in ids_read[64 : 64 + count]]  # after those of the fit
    assert len(texts) == len(first) == count
    vectors = st.SentenceTransformer(distilled["teacher"], device="cpu").encode(texts, convert_to_tensor=True)
    assert logged(distilled)[0] == pytest.approx(1 - float(torch.cosine_similarity(first, vectors).mean()), abs=1e-3)


def test_the_linear_layer_begins_at_its_least_squares_fit(distilled, projected):
    """Beside NumPy's, on embeddings of the model as it is, with a row for each number that keeps it small."""
    from transformers import AutoModel, AutoTokenizer

    assert run(distilled | {"stop_after_n_steps": 1}) == 0
    name = distilled["model_name_or_path"]
    model, tokenizer = enable_bidirectional(AutoModel.from_pretrained(name).float().eval()), AutoTokenizer.from_pretrained(name)
    texts = texts_of(distilled)
    with torch.no_grad():
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
        states = np.stack([model(input_ids=row).last_hidden_state[0].mean(0).double().numpy() for row in ids])
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    vectors = st.SentenceTransformer(distilled["teacher"], device="cpu").encode(texts, normalize_embeddings=True)
    width = states.shape[1]
    small = np.sqrt(0.1 * (states**2).sum() / width) * np.eye(width)
    wanted = np.concatenate([vectors.astype(float), np.zeros((width, WIDTH))])
    fitted = np.linalg.lstsq(np.concatenate([states, small]), wanted, rcond=None)[0]
    np.testing.assert_allclose(projected[0][0].numpy(), fitted.T, rtol=1e-3, atol=1e-4)


def test_weights_in_bfloat16(distilled):
    assert run(distilled | {"torch_dtype": "bfloat16"}) == 0
    assert likeness(distilled) > 0.8


def test_a_resumed_run_gives_what_an_uninterrupted_one_does(distilled, tmp_path):
    distilled |= {"save_strategy": "steps", "save_steps": 2, "save_only_model": False, "overwrite_output_dir": False}
    whole = distilled | {"output_dir": str(tmp_path / "whole"), "stop_after_n_steps": 6}
    assert run(whole) == 0
    assert run(distilled | {"stop_after_n_steps": 4}) == 0
    assert run(distilled | {"stop_after_n_steps": 6}) == 0
    one, two = (st.SentenceTransformer(s["output_dir"], device="cpu").encode(["w1 w2", "w3"]) for s in (distilled, whole))
    assert (one == two).all()


def test_a_checkpoint_without_a_teacher_is_not_gone_on_with(distilled, capsys):
    distilled |= {"save_strategy": "steps", "save_steps": 1, "save_only_model": False, "overwrite_output_dir": False}
    assert run(distilled | {"teacher": None, "stop_after_n_steps": 1}) == 0
    assert run(distilled | {"stop_after_n_steps": 2}) == 2
    assert "it has no 2.linear.weight" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"teacher": "no/such-encoder"}, "can't load the teacher 'no/such-encoder'"),
        ({"loss_scale": 20.0}, "loss_scale: a setting of the contrastive loss, which a teacher replaces"),
        ({"mini_batch_size": 2, "matryoshka_dims": [8]}, "mini_batch_size, matryoshka_dims: a setting of the contrastive loss"),
    ],
)
def test_settings_that_cannot_be_used(distilled, monkeypatch, capsys, change, says):
    from bidirect_patch.cli.simcse import training

    monkeypatch.setattr(training, "load_encoder", lambda *args: pytest.fail("a model was loaded"))
    assert run(distilled | change) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not Path(distilled["output_dir"]).exists()


def test_pairs_have_no_embedding_to_come_near(distilled, place, capsys):
    assert run(distilled | {"dataset_file_path": str(place / "tasks")}) == 2
    assert "holds pairs or triplets, and a teacher embeds single texts" in capsys.readouterr().err.splitlines()[-1]


def test_an_older_sentence_transformers_is_named(distilled, monkeypatch, capsys):
    monkeypatch.delattr("sentence_transformers.sentence_transformer.losses.EmbedDistillLoss")
    assert run(distilled) == 2
    assert "teacher needs sentence-transformers 5.5 or newer" in capsys.readouterr().err.splitlines()[-1]
