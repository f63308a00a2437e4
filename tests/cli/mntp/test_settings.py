"""Settings of the training command: files, flags, and names of other releases."""

import json
import re
import sys
from pathlib import Path

import pytest

from bidirect_patch.cli import main
from bidirect_patch.errors import ConfigError

from ...helpers.words import make_tokenizer

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


def test_flags_win_over_the_file_and_types_are_the_same_either_way(settings):
    from bidirect_patch.cli.mntp.settings import parse

    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings | {"do_train": True, "label_names": ["labels"], "max_steps": None}))
    flags = ["--learning-rate=0.5", "--no_use_fast_tokenizer", "--lora_r", "2", "--streaming", "--max_steps", "-1"]
    model, data, _, training = parse([str(path), *flags])
    assert (training.learning_rate, model.use_fast_tokenizer, model.lora_r) == (0.5, False, 2)
    assert (data.streaming, training.max_steps, training.label_names) == (True, -1, ["labels"])
    as_flags = [f"--{name}={value}" for name, value in settings.items()]
    again = parse([*as_flags, "--do_train", "--max_eval_samples", "3"])
    assert again[1].max_eval_samples == 3 and again[3].learning_rate == 0.01 and again[3].use_cpu is True


@pytest.mark.parametrize(
    "key, flags, expected",
    [
        (0.2, [], 0.2),
        ("0.2", [], 0.2),
        ([0.1, 0.5], [], [0.1, 0.5]),
        (0.2, ["--mlm_probability", "0.1", "0.5"], [0.1, 0.5]),
        ([0.1, 0.5], ["--mlm-probability=0.3"], 0.3),
        (None, [], 0.15),
    ],
)
def test_a_share_is_one_number_or_a_range(settings, tmp_path, key, flags, expected):
    from bidirect_patch.cli.mntp.collator import make_collator
    from bidirect_patch.cli.mntp.settings import parse

    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings | {"mlm_probability": key}))
    _, data, mntp, _ = parse([str(path), "--do_train", *flags])
    shares = make_collator(make_tokenizer(), data, mntp, padding_free=False, seed=0).mlm_probability
    assert (list(shares) if isinstance(shares, tuple) else shares) == expected


HUB = {"dataset_name": "wikitext", "dataset_config_name": "wikitext-103"}
FILES = {"train_file": "train.txt", "validation_file": "validation.txt"}


@pytest.mark.parametrize(
    "hub, flag, left",
    [
        (True, "train_file", {}),
        (True, "validation_file", {}),
        (True, "dataset_name", {}),
        (True, "dataset_config_name", {"dataset_name": "wikitext"}),
        (False, "dataset_name", {}),
        (False, "train_file", {}),
        (False, "validation_file", {"train_file": "train.txt"}),
    ],
)
def test_a_flag_for_texts_replaces_the_texts_of_the_file(settings, tmp_path, hub, flag, left):
    from bidirect_patch.cli.mntp.settings import parse

    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings | dict.fromkeys(HUB | FILES) | (HUB if hub else FILES)))
    data = parse([str(path), "--do_eval", f"--{flag}", "given"])[1]
    expected = {name: [value] if name in FILES else value for name, value in (left | {flag: "given"}).items()}
    assert {name: getattr(data, name) for name in HUB | FILES if getattr(data, name)} == expected


@pytest.mark.parametrize("flag", ["--bf16", "--bf16_full_eval"])
def test_bf16_without_an_accelerator_trains_on_the_cpu(settings, monkeypatch, tmp_path, flag):
    from bidirect_patch.cli import common_settings as module
    from bidirect_patch.cli.mntp.settings import parse

    monkeypatch.setattr(module, "has_accelerator", lambda: False)
    del settings["use_cpu"]
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    assert parse([str(path), "--do_train", flag])[3].use_cpu is True


@pytest.mark.parametrize(
    "change, has_accelerator, expected",
    [
        ({"bf16": True, "max_seq_length": 256}, False, "eager"),
        ({"bf16": True, "max_seq_length": 257}, False, "sdpa"),
        ({"bf16": True, "max_seq_length": None}, False, "sdpa"),
        ({"torch_dtype": "bfloat16", "max_seq_length": 8}, False, "eager"),
        ({"max_seq_length": 8}, False, "sdpa"),
        ({"bf16": True, "max_seq_length": 8, "attn_implementation": "sdpa"}, False, "sdpa"),
        ({"bf16": True, "max_seq_length": 8, "use_cpu": True}, True, "eager"),
        ({"torch_dtype": "bfloat16", "max_seq_length": 8}, True, "sdpa"),
    ],
)
def test_short_texts_in_bfloat16_on_a_cpu_train_with_eager_attention(
    settings, monkeypatch, tmp_path, change, has_accelerator, expected
):
    from bidirect_patch.cli import common_settings as module
    from bidirect_patch.cli.mntp.settings import parse

    monkeypatch.setattr(module, "has_accelerator", lambda: has_accelerator)
    del settings["use_cpu"]
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings | {"do_train": True} | change))
    assert parse([str(path)])[0].attn_implementation == expected


def test_without_flash_attention_another_backend_is_named():
    from bidirect_patch.cli.load_errors import loading
    from bidirect_patch.errors import BackendError

    with pytest.raises(BackendError, match=r"give --attn_implementation sdpa\.$"), loading("it"):
        raise ImportError("FlashAttention2 has been toggled on, but flash_attn is not installed.")


@pytest.mark.parametrize("place_of_it", ["flag", "key"])
def test_deepspeeds_settings_reach_trainers_arguments_as_they_are(settings, monkeypatch, tmp_path, place_of_it):
    """Whether or not deepspeed is installed: what transformers would hand it is caught."""
    import accelerate.utils
    from transformers.integrations import deepspeed

    from bidirect_patch.cli.mntp.settings import parse

    handed = []

    class Caught:
        def __init__(self, config):
            handed.append(config)

        def trainer_config_process(self, *args, **kwargs):
            pass

    monkeypatch.setattr(deepspeed, "HfTrainerDeepSpeedConfig", Caught)
    monkeypatch.setattr(accelerate.utils, "DeepSpeedPlugin", lambda **kwargs: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # undone after: older TrainingArguments set it for good
    zero = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "train_batch_size": "auto"}
    given = zero if place_of_it == "key" else str(tmp_path / "zero.json")
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings | {"do_train": True} | ({"deepspeed": zero} if given is zero else {})))
    training = parse([str(path), *([] if given is zero else ["--deepspeed", given])])[3]
    assert handed == [given] and training.deepspeed == given


@pytest.mark.parametrize(
    "given, known, expected",
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy"}, {"eval_strategy": "steps"}),
        ({"eval_strategy": "steps"}, {"evaluation_strategy"}, {"evaluation_strategy": "steps"}),
        ({"evaluation_strategy": "no"}, {"evaluation_strategy"}, {"evaluation_strategy": "no"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps"}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.0, "warmup_steps": 9}, {"warmup_steps"}, {"warmup_steps": 9}),
        (
            {"group_by_length": True},
            {"train_sampling_strategy"},
            {"train_sampling_strategy": "group_by_length"},
        ),
        ({"group_by_length": "False"}, {"train_sampling_strategy"}, {}),
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length"}, {"group_by_length": True}),
        ({"adafactor": "True"}, {"optim"}, {"optim": "adafactor"}),
        ({"save_safetensors": True, "past_index": -1, "use_ipex": False}, set(), {}),
        ({"nonsense": 1}, set(), {"nonsense": 1}),
    ],
)
def test_names_of_other_releases_keep_their_meaning(given, known, expected):
    from bidirect_patch.cli.settings_by_release import translate_settings

    assert translate_settings(given, known) == expected


@pytest.mark.parametrize(
    "given, known, said",
    [
        ({"save_safetensors": False}, set(), "save_safetensors=False means nothing to transformers"),
        ({"logging_dir": "logs"}, set(), "logging_dir=logs"),
        ({"evaluation_strategy": "steps", "eval_strategy": "no"}, {"eval_strategy"}, "both are given"),
        ({"warmup_ratio": 0.1, "warmup_steps": 9}, {"warmup_steps"}, "both are given"),
    ],
)
def test_a_meaning_that_would_be_lost_is_an_error(given, known, said):
    from bidirect_patch.cli.settings_by_release import translate_settings

    with pytest.raises(ConfigError, match=said):
        translate_settings(given, known)


def test_every_setting_that_older_trainers_knew_is_accounted_for():
    """Names that TrainingArguments had in 4.39.3 and this transformers lacks: each has a rule."""
    from dataclasses import fields

    from bidirect_patch.cli.mntp.settings import KINDS
    from bidirect_patch.cli.settings_by_release import translate_settings

    known = {field.name for kind in KINDS for field in fields(kind)}
    old = """adafactor dispatch_batches evaluation_strategy fp16_backend fp16_opt_level fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap group_by_length half_precision_backend include_inputs_for_metrics
    include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda overwrite_output_dir past_index
    per_gpu_eval_batch_size per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token
    ray_scope save_safetensors split_batches torchdynamo tpu_metrics_debug tpu_num_cores use_ipex
    use_legacy_prediction_loop use_mps_device warmup_ratio"""
    for name in set(old.split()) - known:
        try:
            assert name not in translate_settings({name: "given"}, known)
        except ConfigError:
            pass


@pytest.mark.parametrize(
    "argv, code, said",
    [
        ([], 2, "usage"),
        (["--help"], 0, "usage"),
        (["mtnp"], 2, "no command 'mtnp'; did you mean mntp?"),
        (["mntp", "--lerning_rate", "1"], 2, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        (["mntp", "nowhere.json"], 2, "no settings file 'nowhere.json'"),
        (["mntp"], 2, "nothing to do"),
    ],
)
def test_the_command_line(capsys, argv, code, said):
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert said in (out if code == 0 else err)


@pytest.mark.parametrize("command", ["check", "demo", "mntp", "simcse"])
def test_help_spells_each_flag_once(capsys, command):
    if command == "simcse":
        pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    options = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert any("_" in line for line in options)
    assert not [line for line in options if re.search("--[a-z_]+-[a-z]", line)]


@pytest.mark.parametrize("command", ["check", "demo", "mntp", "simcse"])
def test_help_is_short_and_begins_with_examples(capsys, command):
    if command == "simcse":
        pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 190 and max(map(len, lines)) <= 80
    assert any(line.startswith("example") for line in lines)
    assert any(f"bidirect-patch {command} " in line for line in lines[1:])


@pytest.mark.parametrize("flag", ["--help_all", "--help-all"])
def test_every_setting_is_in_the_long_help(capsys, flag):
    with pytest.raises(SystemExit) as ended:
        main(["mntp", flag])
    assert ended.value.code == 0
    shown = re.findall(r"^  --([a-z_0-9]+)", capsys.readouterr().out, re.MULTILINE)
    assert {"train_file", "ddp_timeout", "adam_beta1"} <= set(shown) and len(shown) > 100


@pytest.mark.parametrize("given", [["--gradient_checkpointing"], ["--no_gradient_checkpointing"], []])
def test_gradient_checkpointing_is_not_reentrant_and_gives_no_warning(recwarn, tmp_path, given):
    from bidirect_patch.cli.mntp.settings import parse

    argv = ["--model_name_or_path", "m", "--train_file", "t", "--do_train", "--output_dir", str(tmp_path), *given]
    training = parse(argv).training
    assert bool(training.gradient_checkpointing) is (given == ["--gradient_checkpointing"])
    if training.gradient_checkpointing:
        assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_the_usage_names_the_three_steps_within_80_columns(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.index("1. ") < out.index("2. mntp") < out.index("3. simcse")
    assert max(map(len, out.splitlines())) <= 80


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["mntp", "--do_train"]) == 2
    assert capsys.readouterr().err == (
        "bidirect-patch: error: training needs peft: pip install 'bidirect-patch[train]'\n"
    )
