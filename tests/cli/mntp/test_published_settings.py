"""The settings files that LLM2Vec publishes for its run_mntp.py, with only model, data and backend replaced."""

import json

import pytest

from bidirect_patch.checkpoints.marks import is_marked
from bidirect_patch.cli import main

from ...helpers.mntp_runs import results
from ...helpers.slow import some_slow
from ...helpers.words import make_tokenizer

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")

# What the five have in common, and what each has of its own.
COMMON = {
    "dataset_name": "wikitext",
    "dataset_config_name": "wikitext-103-raw-v1",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "do_train": True,
    "do_eval": True,
    "max_seq_length": 512,
    "mask_token_type": "blank",
    "data_collator_type": "default",
    "mlm_probability": 0.2,
    "overwrite_output_dir": True,
    "evaluation_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 200,
    "stop_after_n_steps": 1000,
    "lora_r": 16,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
}
OWN = {
    "meta-llama/Llama-2-7b-chat-hf": {},
    "meta-llama/Meta-Llama-3-8B-Instruct": {},
    "meta-llama/Meta-Llama-3.1-8B-Instruct": {},
    "mistralai/Mistral-7B-Instruct-v0.2": {"data_collator_type": "all_mask", "mlm_probability": 0.8},
    "princeton-nlp/Sheared-LLaMA-1.3B": {},
}


@pytest.mark.parametrize("name", some_slow(OWN, lambda name: not OWN[name]))
def test_it_runs(place, tmp_path, monkeypatch, name):
    published = COMMON | OWN[name] | {"model_name_or_path": name, "output_dir": f"output/mntp/{name.split('/')[1]}"}
    path = tmp_path / "published.json"
    path.write_text(json.dumps(published))
    monkeypatch.chdir(tmp_path)
    flags = {"model_name_or_path": place / "model", "dataset_name": place / "text", "attn_implementation": "sdpa"}
    where = {"cache_dir": tmp_path / "cache", "report_to": "none"}
    assert main(["mntp", str(path), *(f"--{key}={value}" for key, value in (flags | where).items())]) == 0
    found = results(published)
    assert is_marked(published["output_dir"])
    assert {"causal_loss", "before_loss", "eval_loss", "train_loss"} <= found.keys()


@pytest.mark.parametrize("name", OWN)
def test_each_setting_is_read_as_it_is_written(tmp_path, name):
    from dataclasses import asdict

    from bidirect_patch.cli.mntp.collator import make_collator
    from bidirect_patch.cli.mntp.settings import parse
    from bidirect_patch.cli.settings_by_release import translate_settings

    published = COMMON | OWN[name] | {"model_name_or_path": name, "output_dir": str(tmp_path / "out")}
    path = tmp_path / "published.json"
    path.write_text(json.dumps(published))
    settings = parse([str(path), "--report_to", "none"])
    read = {key: value for part in settings for key, value in asdict(part).items()}
    written = translate_settings(published, set(read))
    assert {key: getattr(read[key], "value", read[key]) for key in written} == written | {
        "mlm_probability": [published["mlm_probability"]]
    }
    collator = make_collator(make_tokenizer(), settings.data, settings.mntp, padding_free=False, seed=0)
    assert collator.mlm_probability == published["mlm_probability"]
