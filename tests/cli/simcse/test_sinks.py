"""Sink tokens and fewer layers in `bidirect-patch simcse`, and what its folder gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaModel

from bidirect_patch import enable_bidirectional
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.checkpoints.marks import sinks_on_disk
from bidirect_patch.cli import main
from bidirect_patch.cli.spearman import spearman
from bidirect_patch.model.sinks import NO_SINKS, Sinks

from ...helpers.explicit_masks import sink_masks, under
from ...helpers.processes import Fork, finish
from ...helpers.simcse_runs import run, write_pairs

st = pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
peft = pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")

BOS, EOS = 1, 2
TEXTS = ["w1 w2 w3 w4", "w5 w6", "w7"]


@pytest.fixture
def sinks(settings):
    """A short run with one sink token and one sinkless layer, without an adapter of the step before."""
    small = {"stop_after_n_steps": 2, "gradient_checkpointing": False, "peft_model_name_or_path": None}
    return settings | small | {"num_sink_tokens": 1, "num_sinkless_layers": 1}


@pytest.fixture
def encoder(sinks):
    """The folder of such a run."""
    assert run(sinks) == 0
    return sinks["output_dir"]


def explicit(folder, sinkless=1, pooled=slice(1, None)):
    """The mean over the words of each text: the layers called one by one under masks that say who sees whom."""
    with opening_sinks():
        model = LlamaModel.from_pretrained(folder, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad(), under(model.layers, sink_masks(ids.shape[1], len(model.layers), sinkless=sinkless)):
            found.append(model(input_ids=ids)[0][0, pooled].mean(0))
    return torch.stack(found)


def opened(folder):
    with opening_sinks():
        encoder = st.SentenceTransformer(folder, device="cpu")
    enable_bidirectional(encoder, **sinks_on_disk(folder)._asdict())
    return encoder


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_folder_gives_the_mean_over_the_words_under_an_explicit_mask(encoder, side):
    model = opened(encoder)
    model.tokenizer.padding_side = side
    assert [type(module).__name__ for module in model] == ["Transformer", "WithoutSinks", "Pooling"]
    assert model.tokenizer("w1 w2")["input_ids"] == [BOS, 4, 5]
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, explicit(encoder), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embeddings, explicit(encoder, pooled=slice(None)), atol=1e-2)
    assert not torch.allclose(embeddings, explicit(encoder, sinkless=0), atol=1e-4)


def test_an_empty_text_has_an_embedding(encoder):
    assert opened(encoder).encode(["", "w1"], convert_to_tensor=True).isfinite().all()


OPEN = """
import sys
{first}
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1], device="cpu").encode({texts!r}).tolist())
"""


def in_a_process(first, folder):
    """How a new process ends that imports this first, and what it writes to stdout and stderr."""
    process = Fork("-c", OPEN.format(first=first, texts=TEXTS), folder)
    written = finish(process, 200)
    return process.returncode, *written


@pytest.mark.slow
def test_a_process_that_imports_auto_opens_it_and_others_are_told_to(encoder):
    code, out, err = in_a_process("import bidirect_patch.auto", encoder)
    assert code == 0, err
    torch.testing.assert_close(torch.tensor(json.loads(out.splitlines()[-1])), explicit(encoder), rtol=1e-4, atol=1e-5)
    for first in ("", "import bidirect_patch"):
        code, _, err = in_a_process(first, encoder)
        assert code and "bidirect_patch" in err.splitlines()[-1]


def test_evaluation_before_is_of_the_model_with_its_sinks(sinks, place, tmp_path):
    rows = write_pairs(tmp_path / "pairs.jsonl")
    assert run(sinks | {"validation_file": str(tmp_path / "pairs.jsonl"), "num_sinkless_layers": 0}) == 0
    found = json.loads(Path(sinks["output_dir"], "all_results.json").read_text())
    base = enable_bidirectional(AutoModel.from_pretrained(place / "model"), num_sink_tokens=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")

    def embed(text):
        with torch.no_grad():
            return base(input_ids=torch.tensor([[BOS, *tokenizer(text)["input_ids"]]]))[0][0, 1:].mean(0)

    cosines = [torch.cosine_similarity(embed(r["sentence1"]), embed(r["sentence2"]), 0).item() for r in rows]
    expected = spearman(np.round(cosines, 5), np.array([row["score"] for row in rows]))
    assert found["before_spearman_cosine"] == pytest.approx(expected, abs=5e-3)


def test_the_numbers_of_an_adapter_and_of_a_folder_are_the_default(sinks, place, tmp_path, encoder):
    """An adapter of `mntp`, then the folder that it became: no flag again, and the token of the folder's own tokenizer."""
    base = enable_bidirectional(LlamaModel.from_pretrained(place / "model"), num_sink_tokens=1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    plain = {name: value for name, value in sinks.items() if not name.startswith("num_sink")}
    after = plain | {"peft_model_name_or_path": str(tmp_path / "adapter"), "output_dir": str(tmp_path / "after")}
    assert run(after) == 0
    assert sinks_on_disk(after["output_dir"]) == Sinks(1, 0)
    again = plain | {"model_name_or_path": encoder, "output_dir": str(tmp_path / "again")}
    assert run(again) == 0
    assert sinks_on_disk(again["output_dir"]) == Sinks(1, 1)
    assert opened(again["output_dir"]).tokenizer("w1")["input_ids"] == [BOS, 4]
    causal = again | {"bidirectional": False, "output_dir": str(tmp_path / "causal")}
    assert run(causal) == 0
    assert sinks_on_disk(causal["output_dir"]) == NO_SINKS
    assert len(st.SentenceTransformer(causal["output_dir"], device="cpu")) == 2


def test_the_first_layers_are_kept_with_the_norm_after_them(sinks):
    assert run(sinks | {"layers": 1, "learning_rate": 1e-9}) == 0
    model = opened(sinks["output_dir"])
    assert model[0].model.config.num_hidden_layers == len(model[0].model.layers) == 1
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, explicit(sinks["output_dir"]), rtol=1e-4, atol=1e-5)
    base = LlamaModel.from_pretrained(sinks["model_name_or_path"]).eval()
    del base.layers[1:]
    enable_bidirectional(base, num_sink_tokens=1, num_sinkless_layers=1)
    with torch.no_grad():
        expected = base(**model.tokenizer(TEXTS[0], return_tensors="pt"))[0][0, 1:].mean(0)
    torch.testing.assert_close(embeddings[0], expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_of_the_first_layers_is_not_put_on_the_whole_model(sinks, tmp_path, capsys):
    from bidirect_patch.cli.layers import keep_layers

    base = LlamaModel.from_pretrained(sinks["model_name_or_path"])
    keep_layers(base, 1)
    adapter = peft.get_peft_model(enable_bidirectional(base), peft.LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "cut")
    sinks |= {"peft_model_name_or_path": str(tmp_path / "cut")}
    assert run(sinks) == 2
    said = capsys.readouterr().err
    assert "was trained on the first 1 layers, and the model has 2: give layers=1" in said
    assert run(sinks | {"layers": 1}) == 0


def test_an_end_token_and_a_sink(sinks, ids_read):
    assert run(sinks | {"pooling_mode": "eos_token", "max_seq_length": 8}) == 0
    assert {ids[0] for ids in ids_read} == {BOS} and {ids[-1] for ids in ids_read} == {EOS}
    assert max(map(len, ids_read)) == 8


def test_gradients_of_small_batches_are_those_of_the_whole(sinks, tmp_path):
    """GradCache calls the model again with the features of before."""
    sinks |= {"stop_after_n_steps": 1, "lora_dropout": 0.0, "simcse_dropout": 0.1, "mini_batch_size": 4}
    assert run(sinks) == 0
    assert opened(sinks["output_dir"]).encode(TEXTS, convert_to_tensor=True).isfinite().all()


def test_a_resumed_run_gives_what_an_uninterrupted_one_does(sinks, tmp_path, capsys):
    sinks |= {"save_steps": 2, "save_only_model": False, "stop_after_n_steps": 4, "overwrite_output_dir": False}
    whole = sinks | {"output_dir": str(tmp_path / "whole")}
    for lora_r in (4, 0):
        sinks, whole = ({**s, "lora_r": lora_r, "output_dir": f"{s['output_dir']}-{lora_r}"} for s in (sinks, whole))
        assert run(whole) == 0
        assert run(sinks | {"stop_after_n_steps": 2}) == 0
        assert run(sinks) == 0
        ours, expected = (opened(s["output_dir"]).encode(TEXTS, convert_to_tensor=True) for s in (sinks, whole))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert run(sinks | {"num_sinkless_layers": 0, "stop_after_n_steps": 6}) == 2
        assert "it was trained with num_sink_tokens=1, num_sinkless_layers=1, and this run" in capsys.readouterr().err


def test_what_it_says_to_do_next_imports_auto(sinks, capsys):
    assert run(sinks) == 0
    assert ", after import bidirect_patch.auto: SentenceTransformer(" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_sink_tokens": 0}, "num_sinkless_layers=1 without sink tokens"),
        ({"num_sinkless_layers": 3}, "num_sinkless_layers must be at most 2, the number of layers; got 3"),
        ({"bidirectional": False}, "a causal model has no sink tokens"),
        ({"layers": 3}, "layers must be at most 2, the model's; got 3"),
        ({"max_seq_length": 1}, "max_seq_length must be above num_sink_tokens=1; got 1"),
        ({"sink_token": "nowhere"}, "sink_token=nowhere: this is no token of the tokenizer's vocabulary"),
        ({"chat_template": True, "sink_token": "bos"}, "give chat_template or sink_token, not both"),
    ],
)
def test_settings_that_cannot_be_used(sinks, capsys, change, says):
    assert run(sinks | change) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("bidirect-patch: error: ") and says in said[-1]
    assert not Path(sinks["output_dir"]).exists()


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["simcse", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("layers N", "num_sink_tokens N", "num_sinkless_layers N", "sink_token TEXT"))
