"""The training command, run as a user runs it: a tiny Llama, real files, real Trainer, no network."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bidirect_patch.checkpoints.load import says_bidirectional
from bidirect_patch.cli import main
from bidirect_patch.errors import ConfigError

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")

ROOT = Path(__file__).parents[2]
WORDS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `model`, a tiny causal Llama and its tokenizer, and `text`, where a word tells the next one."""
    folder = tmp_path_factory.mktemp("place")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "_", *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder / "model")
    rng = random.Random(0)
    lines = [" ".join(f"w{(i * 7 + j) % WORDS}" for j in range(rng.randrange(3, 30))) for i in range(300)]
    lines[5] = ""
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text("\n".join(lines[:260]) + "\n")
    (folder / "text" / "validation.txt").write_text("\n".join(lines[260:]) + "\n")
    return folder


@pytest.fixture
def settings(place, tmp_path):
    return {
        "model_name_or_path": str(place / "model"),
        "train_file": str(place / "text" / "train.txt"),
        "validation_file": str(place / "text" / "validation.txt"),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "max_seq_length": 32,
        "mlm_probability": 0.2,
        "learning_rate": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def run(settings, *flags):
    """Run in this process; the exit code."""
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings))
    return main(["mntp", str(path), *flags])


def launch(*command, **how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def results(settings):
    return json.loads((Path(settings["output_dir"]) / "all_results.json").read_text())


def weights(settings, name="adapter_model.safetensors"):
    return load_file(Path(settings["output_dir"]) / name)


def reaches_back(model):
    """Whether the first position's output depends on the last token."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        first = model.eval()(input_ids=ids)[0][:, 0]
    return not torch.equal(first[0], first[1])


def test_a_published_settings_file_runs_unchanged_and_the_result_opens_bidirectional(place, settings, tmp_path, capfd):
    """The keys of LLM2Vec's train_configs/mntp/*.json, all of them, with a model and data that fit a test."""
    from peft import PeftModel

    from bidirect_patch import enable_bidirectional

    published = {
        "model_name_or_path": settings["model_name_or_path"],
        "dataset_name": str(place / "text"),
        "dataset_config_name": None,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "do_train": True,
        "do_eval": True,
        "max_seq_length": 64,
        "mask_token_type": "blank",
        "data_collator_type": "default",
        "mlm_probability": 0.2,
        "overwrite_output_dir": True,
        "output_dir": settings["output_dir"],
        "evaluation_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "stop_after_n_steps": 8,
        "lora_r": 16,
        "gradient_checkpointing": True,
        "torch_dtype": "bfloat16",
        "attn_implementation": "eager",
    }
    path = tmp_path / "published.json"
    path.write_text(json.dumps(published))
    process = launch("bidirect_patch", "mntp", path, "--cache_dir", tmp_path / "cache", "--learning_rate", "0.01")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "causal, before training" in out and "bidirectional, untrained" in out and "after 8 steps" in out
    assert out.count("eval_accuracy") == 2  # on schedule, at steps 4 and 8
    assert "%|" in err  # the progress bar
    folder = Path(settings["output_dir"])
    assert {"checkpoint-4", "checkpoint-8"} <= {entry.name for entry in folder.iterdir()}
    found = results(settings)
    assert found["eval_loss"] < found["before_loss"] - 0.1 and found["causal_loss"] != found["before_loss"]

    assert says_bidirectional(folder)
    base = enable_bidirectional(AutoModel.from_pretrained(settings["model_name_or_path"]))
    ids = torch.arange(4, 12)[None]
    before = base(input_ids=ids)[0]
    trained = PeftModel.from_pretrained(base, folder).eval()
    assert reaches_back(trained)
    assert not torch.allclose(trained(input_ids=ids)[0], before, atol=1e-3)
    assert AutoTokenizer.from_pretrained(folder).mask_token is None  # the tokenizer as it was


def test_all_weights_are_saved_as_a_stock_model_that_says_it_is_bidirectional(settings):
    from bidirect_patch import enable_bidirectional

    assert run(settings, "--do_train", "--stop_after_n_steps=3", "--lora_r=0") == 0
    config = json.loads((Path(settings["output_dir"]) / "config.json").read_text())
    assert config["is_causal"] is False and config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    original = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert reaches_back(enable_bidirectional(model))


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("stop", [3, 4])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(settings, lora_r, stop):
    """64 sequences, 4 steps an epoch: stopped within one, and between two."""
    settings |= {"do_train": True, "per_device_train_batch_size": 16, "lora_r": lora_r, "lora_dropout": 0.3}
    settings |= {"max_train_samples": 64, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    settings |= {"line_by_line": True}
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    name = "adapter_model.safetensors" if lora_r else "model.safetensors"
    assert run(whole | {"stop_after_n_steps": 6}) == 0
    assert run(settings | {"stop_after_n_steps": stop}) == 0
    halfway = weights(settings, name)
    assert run(settings | {"stop_after_n_steps": 6}) == 0  # as the same command again: it finds the checkpoint
    resumed, expected = weights(settings, name), weights(whole, name)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert any(not torch.equal(halfway[key], expected[key]) for key in expected)


@pytest.mark.parametrize("held_out", [0, 20])
def test_a_stream_starts_over_and_is_resumed_in_its_second_pass(settings, held_out):
    """40 sequences of 16 a step: stopped after 5 steps, twice through."""
    settings |= {"do_train": True, "streaming": True, "max_train_samples": 40, "per_device_train_batch_size": 16}
    settings |= {"save_strategy": "steps", "save_steps": 5, "line_by_line": True, "lora_dropout": 0.3}
    if held_out:
        settings |= {"do_eval": True, "validation_file": None, "max_eval_samples": held_out}
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    assert run(whole | {"stop_after_n_steps": 8}) == 0
    assert run(settings | {"stop_after_n_steps": 5, "max_steps": 8}) == 0
    assert run(settings | {"stop_after_n_steps": 8}) == 0
    resumed, expected = weights(settings), weights(whole)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


@pytest.mark.parametrize("limit", ["max_steps", "stop_after_n_steps"])
def test_a_finished_run_is_not_trained_further(settings, limit):
    settings |= {"do_train": True, "do_eval": True, "save_strategy": "steps", "save_steps": 2, limit: 2}
    assert run(settings) == 0
    done, loss = weights(settings), results(settings)["eval_loss"]
    assert run(settings) == 0
    again = weights(settings)
    assert all(torch.equal(again[key], done[key]) for key in done)
    assert results(settings)["eval_loss"] == loss
    assert json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["global_step"] == 2


def test_an_overwriting_run_is_not_resumed_from_the_run_before(settings):
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1}
    folder = Path(settings["output_dir"])
    assert run(settings | {"stop_after_n_steps": 4}) == 0
    assert run(settings | {"stop_after_n_steps": 2, "overwrite_output_dir": True}) == 0
    assert run(settings | {"stop_after_n_steps": 3, "overwrite_output_dir": True}, "--resume_from_checkpoint=true") == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert (folder / "old-checkpoint-4").is_dir()  # nothing is lost


def test_masks_do_not_depend_on_the_batch(settings):
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    collator = RepeatableCollator(tokenizer, seed=7)

    def masked(size):
        made = batches(settings, collator, 32, size)
        parts = [[batch[key][batch["attention_mask"].bool()] for key in ("input_ids", "labels")] for batch in made]
        return [torch.cat(part).tolist() for part in zip(*parts)]

    first = masked(8)
    assert first == masked(3) == masked(1)
    collator.epoch = 1
    assert first != masked(8)


def test_a_half_written_checkpoint_is_passed_over(settings):
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1}
    assert run(settings | {"stop_after_n_steps": 2}) == 0
    folder = Path(settings["output_dir"])
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9")
    (folder / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    assert run(settings | {"stop_after_n_steps": 3}, "--resume_from_checkpoint", "true") == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize(
    "kill, code",
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_can_be_resumed(settings, kill, code):
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1000}
    folder = Path(settings["output_dir"])
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(settings))
    # What runs in a shell's background inherits that SIGINT is ignored.
    process = launch("bidirect_patch", "mntp", path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint-3").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    from bidirect_patch.cli.mntp.checkpoints import last_whole_checkpoint

    reached = int(last_whole_checkpoint(str(folder)).rpartition("-")[2])
    assert run(settings | {"stop_after_n_steps": reached + 1}) == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == reached + 1


def batches(settings, collator, lengths, size=8):
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    lines = Path(settings["validation_file"]).read_text().splitlines()
    rows = [tokenizer(line, truncation=True, max_length=lengths)["input_ids"] for line in lines if line]
    return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def test_evaluation_is_the_mean_over_all_masked_tokens(settings):
    """Against stock transformers: logits of every position, shifted and averaged by hand, on batches of uneven size."""
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    settings |= {"do_eval": True, "line_by_line": True, "seed": 7}
    assert run(settings) == 0
    found = results(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    stock = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).eval()
    losses, right = [], []
    for batch in batches(settings, RepeatableCollator(tokenizer, mlm_probability=0.2, seed=7), 32):
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = stock(**batch).logits[:, :-1][labels != -100]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none"))
        right.append(logits.argmax(-1) == labels[labels != -100])
    assert len({len(part) for part in losses}) > 1
    assert found["causal_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert found["causal_accuracy"] == pytest.approx(torch.cat(right).float().mean().item(), abs=1e-6)
    assert found["causal_masked_tokens"] == len(torch.cat(losses))
    assert found["eval_loss"] == found["before_loss"] != found["causal_loss"]


def test_padding_free_trains_to_the_same_weights_as_padding(settings):
    """The same texts and masks, laid out otherwise; and to others than no training at all."""
    settings |= {"do_train": True, "line_by_line": True, "lora_dropout": 0.0, "stop_after_n_steps": 3}
    packed = settings | {"output_dir": settings["output_dir"] + "-packed", "padding_free": True}
    assert run(settings) == 0 and run(packed) == 0
    padded, packed = weights(settings), weights(packed)
    assert all(torch.allclose(packed[key], padded[key], atol=2e-4) for key in padded)
    assert all(padded[key].abs().max() > 0.01 for key in padded if "lora_B" in key)  # where it starts is zero


@pytest.mark.parametrize("kind", ["jsonl", "csv", "stream", "folder"])
def test_texts_of_any_kind_train_to_the_same_weights(place, settings, tmp_path, kind):
    """Unshuffled batches come out alike whatever the texts came in."""
    settings |= {"do_train": True, "stop_after_n_steps": 2, "line_by_line": True, "per_device_train_batch_size": 260}
    settings |= {"learning_rate": 0.001, "lr_scheduler_type": "constant"}
    other = settings | {"output_dir": settings["output_dir"] + "-other"}
    lines = Path(settings["train_file"]).read_text().splitlines()
    if kind == "jsonl":
        text = "\n".join(json.dumps({"id": i, "text": line}) for i, line in enumerate(lines))
    elif kind == "csv":
        text = "text,id\n" + "\n".join(f"{line},{i}" for i, line in enumerate(lines))
    if kind in ("jsonl", "csv"):
        other["train_file"] = str(tmp_path / f"train.{kind}")
        Path(other["train_file"]).write_text(text + "\n")
        other["validation_file"] = None
    elif kind == "stream":
        other["streaming"] = True
    else:
        other |= {"train_file": None, "validation_file": None, "dataset_name": str(place / "text")}
    if kind == "stream":  # a stream isn't shuffled, so neither may the other be
        assert run(other) == 0
        assert json.loads((Path(other["output_dir"]) / "trainer_state.json").read_text())["global_step"] == 2
        return
    assert run(settings) == 0 and run(other) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(settings).values(), weights(other).values()))


def test_chunks_are_the_text_cut_every_so_many_tokens(settings):
    from bidirect_patch.cli.mntp import data
    from bidirect_patch.cli.mntp.settings import parse

    settings |= {"do_train": True, "max_seq_length": 50}
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings))
    model_settings, data_settings, _, training = parse([str(path)])
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    texts = data.load_texts(model_settings, data_settings, training)
    assert set(texts) == {"train"}
    chunks = data.tokenize(texts["train"], "train", tokenizer, data_settings, training)
    line = tokenizer(Path(settings["train_file"]).read_text())["input_ids"]
    assert len(chunks) == len(line) // 50
    assert [i for row in chunks["input_ids"] for i in row] == line[: len(chunks) * 50]


def test_a_share_is_held_out_if_there_is_no_validation_file(settings):
    settings |= {"do_eval": True, "do_train": True, "validation_file": None, "validation_split_percentage": 20}
    settings |= {"stop_after_n_steps": 1, "line_by_line": True, "per_device_eval_batch_size": 4}
    assert run(settings) == 0
    seen = results(settings)["eval_samples_per_second"] * results(settings)["eval_runtime"]
    assert seen == pytest.approx(51, abs=1)  # 52 of 260 lines, one of them blank


@pytest.mark.slow
def test_real_weights_from_gguf_learn(load_real, real_weights, settings, tmp_path):
    """SmolLM2 on Python's own help texts: worse when made bidirectional, and on its way back after three steps."""
    from pydoc_data.topics import topics

    load_real()  # skips where transformers reads no GGUF
    path = tmp_path / "topics.txt"
    path.write_text("\n".join(" ".join(text.split()) for text in list(topics.values())[:12]))
    settings |= {"model_name_or_path": str(real_weights), "gguf_file": next(real_weights.glob("*.gguf")).name}
    settings |= {"train_file": str(path), "validation_file": None, "validation_split_percentage": 25}
    settings |= {"max_seq_length": 64, "max_eval_samples": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    assert run(settings, "--do_train", "--do_eval", "--stop_after_n_steps=3") == 0
    found = results(settings)
    assert found["causal_loss"] + 0.5 < found["before_loss"]
    assert found["eval_loss"] + 0.2 < found["before_loss"]
    assert says_bidirectional(settings["output_dir"])


@pytest.mark.slow
def test_two_processes_train_what_one_does(settings):
    """With an evaluation before, after which accelerate would leave each to its own gradients."""
    path = Path(settings["output_dir"]).with_suffix(".json")
    settings |= {"do_train": True, "do_eval": True, "stop_after_n_steps": 6, "lora_dropout": 0.0, "lora_r": 4}
    settings |= {"per_device_train_batch_size": 4}
    alone = settings | {"gradient_accumulation_steps": 2, "output_dir": settings["output_dir"] + "-alone"}
    path.write_text(json.dumps(settings))
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone")
    process = launch(*launcher, "-m", "bidirect_patch", "mntp", path)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert out.count("after 6 steps") == 1
    assert run(alone) == 0
    ours, expected = weights(settings), weights(alone)
    assert all(torch.allclose(ours[key], expected[key], atol=1e-5) for key in expected)


@pytest.mark.slow
def test_two_processes_under_deepspeed_train_the_same_adapter(settings, tmp_path):
    """ZeRO-2 on CPUs gives what DDP gives, and its checkpoints are resumed from."""
    pytest.importorskip("deepspeed", reason="deepspeed isn't installed")
    settings |= {"do_train": True, "do_eval": True, "stop_after_n_steps": 4, "lora_dropout": 0.0}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    other = settings | {"output_dir": settings["output_dir"] + "-ddp"}
    zero = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
    zero |= {"zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": 8, "train_batch_size": 16}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone")
    for flags in (["--stop_after_n_steps=2"], []):
        path = Path(settings["output_dir"]).with_suffix(".json")
        path.write_text(json.dumps(settings))
        flags += ["--deepspeed", str(tmp_path / "zero.json")]
        process = launch(*launcher, "-m", "bidirect_patch", "mntp", path, *flags)
        _, err = process.communicate(timeout=250)
        assert process.returncode == 0, err
    path.write_text(json.dumps(other))
    assert launch(*launcher, "-m", "bidirect_patch", "mntp", path).wait(250) == 0
    ours, expected = weights(settings), weights(other)
    assert all(torch.allclose(ours[key], expected[key], atol=1e-6) for key in expected)


# ---- bad input: one line, exit code 2, nothing started ----


def refused(capsys, settings, *flags):
    assert run(settings, *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("bidirect-patch: error: ")]
    assert len(said) == 1 and said[0] == lines[-1] and "Traceback" not in "".join(lines)
    assert not Path(settings["output_dir"]).exists()
    return said[0]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"do_train": False}, "nothing to do: give do_train, do_eval or both"),
        ({"mlm_probabilty": 0.3}, "unknown key 'mlm_probabilty'; did you mean 'mlm_probability'?"),
        ({"mlm_probability": 0}, "mlm_probability must be in (0, 1]; got 0.0"),
        ({"mlm_probability": 1.5}, "mlm_probability must be in (0, 1]; got 1.5"),
        ({"mlm_probability": "much"}, "argument --mlm_probability"),
        ({"mask_token_type": "star"}, "argument --mask_token_type"),
        ({"mask_token": "w1 w2"}, "must be exactly one id of the tokenizer; 'w1 w2' gives 2"),
        ({"mask_token_type": "mask"}, "'<mask>' gives 0"),
        ({"train_file": "nowhere.txt"}, "no such file: nowhere.txt"),
        ({"train_file": None, "validation_file": None}, "do_train needs dataset_name or train_file"),
        ({"train_file": None, "validation_file": None, "dataset_name": "no/such-data"}, "can't read no/such-data"),
        ({"dataset_name": "wikitext"}, "give dataset_name or files, not both"),
        ({"model_name_or_path": "no/such-model"}, "can't load 'no/such-model'"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"max_seq_length": 100000, "validation_file": None}, None),
        ({"max_seq_length": 0}, "max_seq_length must be at least 2, since no first token is predicted; got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0"),
        ({"per_device_train_batch_size": -3}, "per_device_train_batch_size must be at least 1; got -3"),
        ({"learning_rate": -1}, "learning_rate must be 0 or more; got -1.0"),
        ({"num_train_epochs": "nan"}, "num_train_epochs must be above 0; got nan"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"mlm_probability": [0.1]}, "mlm_probability is one value; got [0.1]"),
        ({"train_file": ["a", "b"]}, "train_file is one value"),
        ({"learning_rate": [1]}, "learning_rate is one value"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs"),
        ({"model_name_or_path": "/no/such/folder"}, "there is no such folder"),
        ({"lora_dropout": 1}, "lora_dropout must be in [0, 1); got 1.0"),
        ({"lora_r": -1}, "lora_r must be 0 or more; got -1"),
        ({"learning_rate": "fast"}, "argument --learning_rate"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"evaluation_strategy": "sometimes"}, "sometimes"),
        ({"pad_to_max_length": True, "padding_free": True}, "contradict each other"),
        ({"streaming": True, "do_eval": True, "validation_file": None}, "a stream has no percentage"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere holds no whole checkpoint"),
    ],
)
def test_bad_settings(capsys, settings, change, said):
    settings |= {"do_train": True, "stop_after_n_steps": 1} | change
    if said is None:  # longer than the tokenizer's limit is cut to it, as in run_mlm
        assert run(settings) == 0
    else:
        assert said in refused(capsys, settings)


@pytest.mark.parametrize(
    "text, said", [("", "there is no text"), ("\n  \n", "no line of two tokens"), ("w1", "no line of two tokens")]
)
def test_text_with_nothing_in_it(capsys, settings, tmp_path, text, said):
    path = tmp_path / "empty.txt"
    path.write_text(text)
    settings |= {"do_train": True, "train_file": str(path), "validation_file": None, "line_by_line": True}
    if text == "w1":  # one word is a line, if not a chunk
        settings["line_by_line"], said = False, "less than one chunk of max_seq_length=32"
    assert said in refused(capsys, settings)


def test_texts_with_gaps_are_read_and_other_things_refused(capsys, settings, tmp_path):
    settings |= {"do_train": True, "stop_after_n_steps": 1, "line_by_line": True, "validation_file": None}
    path = tmp_path / "texts.jsonl"
    settings["train_file"] = str(path)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (None, "", "w1 w2 w3 w4 w5 w6", "w2 w3 w4")))
    assert run(settings) == 0
    path.write_text("".join(json.dumps({"text": number}) + "\n" for number in (3, 4)))
    assert "no column of text: 'text' holds int '3'" in refused(
        capsys, settings | {"output_dir": str(tmp_path / "other")}
    )


def test_blank_lines_are_no_text_in_chunks_either(capsys, settings, tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text("   \n\t\n" * 200)
    settings |= {"do_train": True, "train_file": str(path), "validation_file": None}
    assert "less than one chunk" in refused(capsys, settings)


def test_an_output_folder_that_cannot_be(capsys, settings, tmp_path):
    (tmp_path / "file").write_text("")
    settings |= {"do_train": True}
    path = tmp_path / "settings.json"
    for place_of_it in (tmp_path / "file", tmp_path / "file" / "out"):
        path.write_text(json.dumps(settings | {"output_dir": str(place_of_it)}))
        assert main(["mntp", str(path)]) == 2
        assert "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [("{", "is not JSON"), ("[1]", "it holds a list")])
def test_a_settings_file_that_is_none(capsys, tmp_path, text, said):
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert main(["mntp", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_bidirectional(capsys, settings, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    shutil.copytree(settings["model_name_or_path"], tmp_path / "mamba")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    settings |= {"do_train": True, "model_name_or_path": str(tmp_path / "mamba")}
    assert "Mamba" in refused(capsys, settings)


def test_a_backend_that_is_not_installed(capsys, settings):
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here, so there is nothing to refuse")
    said = refused(capsys, settings | {"do_train": True, "attn_implementation": "flash_attention_2"})
    assert "flash" in said.lower() and "install" in said


def test_a_folder_that_holds_something_else_is_left_alone(capsys, settings):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run(settings | {"do_train": True}) == 2
    assert "overwrite_output_dir" in capsys.readouterr().err
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]


# ---- settings: files, flags, and names of other releases ----


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
    from bidirect_patch.cli.versions import translate_settings

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
    from bidirect_patch.cli.versions import translate_settings

    with pytest.raises(ConfigError, match=said):
        translate_settings(given, known)


def test_every_setting_that_older_trainers_knew_is_accounted_for():
    """Names that TrainingArguments had in 4.39.3 and this transformers lacks: each has a rule."""
    from dataclasses import fields

    from bidirect_patch.cli.mntp.settings import KINDS
    from bidirect_patch.cli.versions import translate_settings

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
        pytest.importorskip("sentence_transformers", reason="the contrastive step needs the extra [simcse]")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    options = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert any("_" in line for line in options)
    assert not [line for line in options if re.search("--[a-z_]+-[a-z]", line)]


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["mntp", "--do_train"]) == 2
    assert capsys.readouterr().err == (
        "bidirect-patch: error: training needs peft: pip install 'bidirect-patch[train]'\n"
    )
