"""`--preset small` of the training commands."""

import importlib
import importlib.util
import json
import re

import pytest

from bidirect_patch.errors import ConfigError

from ..helpers.paths import ROOT

COMMANDS = {
    "mntp": ["--model_name_or_path", "m", "--train_file", "t.txt", "--do_train"],
    "simcse": ["--model_name_or_path", "m", "--dataset_file_path", "t.txt", "--do_train"],
    "words": ["--model_name_or_path", "m", "--train_file", "t.conllu", "--do_train"],
}


@pytest.fixture(params=COMMANDS)
def command(request):
    if request.param == "simcse":
        pytest.importorskip("sentence_transformers", "6", reason="simcse needs the extra [simcse]")
    return request.param


def settings_of(command):
    return importlib.import_module(f"bidirect_patch.cli.{command}.settings")


def parsed(command, tmp_path, *argv):
    """All settings that the command would run with, by name."""
    found = {}
    for part in settings_of(command).parse([*argv, *COMMANDS[command], "--output_dir", str(tmp_path / "out")]):
        found |= vars(part)
    return found | {"gradient_checkpointing": found.get("activation_checkpointing", found.get("gradient_checkpointing"))}


def as_parsed(value):
    return [value] if isinstance(value, float) else value


def test_each_value_of_the_preset_is_taken_and_none_is_the_default_already(command, tmp_path):
    preset = settings_of(command).PRESETS["small"]
    plain, small = parsed(command, tmp_path), parsed(command, tmp_path, "--preset", "small")
    for name, value in preset.items():
        assert small[name] in (value, as_parsed(value)), name
    same = [name for name in preset if plain[name] == small[name]]
    assert same in ([], ["per_device_train_batch_size"])  # 8 is transformers' default, by chance


def test_a_flag_and_a_file_win_over_it(command, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"preset": "small", "lora_r": 4, "warmup_steps": 3}))
    found = parsed(command, tmp_path, str(file), "--warmup_steps", "5")
    assert (found["lora_r"], found["warmup_steps"]) == (4, 5)
    assert found["max_steps"] == settings_of(command).PRESETS["small"]["max_steps"]


@pytest.mark.parametrize("flag", ["--num_sink_tokens 0", "--no_bidirectional", "--bidirectional false"])
def test_its_sinks_go_where_they_have_no_meaning(command, tmp_path, flag):
    if command == "mntp" and "bidirectional" in flag:
        pytest.skip("mntp trains no causal model")
    preset = settings_of(command).PRESETS["small"]
    found = parsed(command, tmp_path, "--preset", "small", *flag.split())
    assert not found["num_sink_tokens"] and not found["num_sinkless_layers"] and found["max_steps"] == preset["max_steps"]
    two = parsed(command, tmp_path, "--preset", "small", "--num_sink_tokens", "2")
    assert two["num_sinkless_layers"] == preset.get("num_sinkless_layers")


@pytest.mark.parametrize("given", ["large", "", "['small']"])
def test_an_unknown_preset_is_an_error_that_names_those_there_are(command, tmp_path, given):
    with pytest.raises(ConfigError, match="small"):
        parsed(command, tmp_path, "--preset", given)


def test_the_guide_lists_what_it_stands_for(command):
    guide = (ROOT / "bidirect_patch" / "cli" / "README.md").read_text()
    lines = re.findall(rf"^\| `{command}` \| (.*) \|$", guide, re.MULTILINE)
    listed = dict(re.findall(r"`(\w+) ([^`]+)`", lines[-1]))
    assert listed == {name: str(value).lower() for name, value in settings_of(command).PRESETS["small"].items()}
