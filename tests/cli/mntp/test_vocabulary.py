"""A mask token that is added, and a tokenizer with more tokens than the model has embeddings."""

import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ...helpers.mntp_runs import run
from ...helpers.saved import told_of_causal_loading

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


def embeddings_of(settings):
    """The embedding of every token in a saved adapter on its base, as bidirect_patch/cli/README.md says to open it."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(settings["output_dir"])
    base = AutoModel.from_pretrained(settings["model_name_or_path"])
    base.resize_token_embeddings(len(tokenizer))
    with told_of_causal_loading("the adapter"):
        model = PeftModel.from_pretrained(base, settings["output_dir"]).eval()
    with torch.no_grad():
        return model.get_input_embeddings()(torch.arange(len(tokenizer)))


def test_an_added_mask_token_is_trained_beside_the_adapter(settings):
    settings |= {
        "do_train": True,
        "do_eval": True,
        "mask_token_type": "mask",
        "stop_after_n_steps": 3,
        "weight_decay": 0.5,
    }
    settings |= {"save_strategy": "steps", "save_steps": 2}
    untrained = settings | {"output_dir": settings["output_dir"] + "-untrained", "learning_rate": 0.0}
    assert run(settings) == 0 and run(untrained) == 0
    tokenizer = AutoTokenizer.from_pretrained(settings["output_dir"])
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<mask>", 64)
    base = AutoModel.from_pretrained(settings["model_name_or_path"]).get_input_embeddings().weight
    trained, start = embeddings_of(settings), embeddings_of(untrained)
    assert len(trained) == len(base) + 1
    assert torch.equal(trained[:-1], base) and torch.equal(start[:-1], base)
    assert (trained[-1] - start[-1]).abs().max() > 0.01


def test_a_run_with_an_added_mask_token_is_resumed(settings):
    settings |= {"do_train": True, "mask_token_type": "mask", "save_strategy": "steps", "save_steps": 1}
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    assert run(whole | {"stop_after_n_steps": 3}) == 0
    assert run(settings | {"stop_after_n_steps": 2}) == 0 and run(settings | {"stop_after_n_steps": 3}) == 0
    assert torch.equal(embeddings_of(settings), embeddings_of(whole))


def test_all_weights_are_saved_with_the_row_of_an_added_mask_token(settings):
    settings |= {"do_train": True, "mask_token_type": "mask", "stop_after_n_steps": 1, "lora_r": 0}
    assert run(settings) == 0
    with told_of_causal_loading():
        model = AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == 65


def test_a_tokenizer_that_is_longer_than_the_embedding(settings, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(settings["model_name_or_path"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.add_tokens(["w0 w1"])
    tokenizer.save_pretrained(folder)
    settings |= {"do_train": True, "stop_after_n_steps": 1, "model_name_or_path": str(folder)}
    assert run(settings) == 0
    assert len(embeddings_of(settings)) == 66
