"""The training command, run as a user runs it: a tiny Llama, real files, real Trainer, no network."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from bidirect_patch import enable_bidirectional, is_bidirectional
from bidirect_patch.checkpoints.marks import is_marked
from bidirect_patch.cli import main

from ...helpers.mntp_runs import batches, results, run, weights
from ...helpers.one_text import reaches_back
from ...helpers.processes import Fork, finish, in_two_ranks
from ...helpers.saved import told_of_causal_loading
from ...helpers.simcse_runs import write_pairs
from ...helpers.slow import some_slow
from ...helpers.versions import TRANSFORMERS

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


def test_a_published_settings_file_runs_unchanged_and_the_result_opens_bidirectional(place, settings, tmp_path, capfd):
    """The keys of LLM2Vec's train_configs/mntp/*.json, all of them, with a model and data that fit a test."""
    from peft import PeftModel

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
    process = Fork("-m", "bidirect_patch", "mntp", path, "--cache_dir", tmp_path / "cache", "--learning_rate", "0.01")
    out, err = finish(process, 200)
    assert process.returncode == 0, err
    assert "causal, before training" in out and "bidirectional, untrained" in out and "after 8 steps" in out
    assert out.count("eval_accuracy") == 3  # on schedule, at steps 4 and 8, and of the result
    assert "%|" not in err  # a progress bar, in a file a line each time
    assert "is_gradient_checkpointing" not in err and "pin_memory" not in err  # warnings about what it does not ask for
    folder = Path(settings["output_dir"])
    assert {"checkpoint-4", "checkpoint-8"} <= {entry.name for entry in folder.iterdir()}
    found = results(settings)
    assert found["eval_loss"] < found["before_loss"] - 0.1 and found["causal_loss"] != found["before_loss"]

    assert is_marked(folder)
    base = enable_bidirectional(AutoModel.from_pretrained(settings["model_name_or_path"]))
    ids = torch.arange(4, 12)[None]
    before = base(input_ids=ids)[0]
    trained = PeftModel.from_pretrained(base, folder).eval()
    assert reaches_back(trained)
    assert not torch.allclose(trained(input_ids=ids)[0], before, atol=1e-3)
    assert AutoTokenizer.from_pretrained(folder).mask_token is None  # the tokenizer as it was


def test_all_weights_are_saved_as_a_stock_model_that_says_it_is_bidirectional(settings):
    assert run(settings, "--do_train", "--stop_after_n_steps=3", "--lora_r=0") == 0
    config = json.loads((Path(settings["output_dir"]) / "config.json").read_text())
    assert config["is_causal"] is False and config["architectures"] == ["LlamaForCausalLM"]
    with told_of_causal_loading():
        model = AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    original = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert reaches_back(enable_bidirectional(model))


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


def test_the_rest_of_the_data_is_dropped_in_training_alone(settings):
    settings |= {"do_eval": True, "line_by_line": True}
    assert run(settings) == 0
    expected = results(settings)
    assert run(settings | {"dataloader_drop_last": True, "overwrite_output_dir": True}) == 0
    assert {name: results(settings)[name] for name in ("eval_loss", "eval_masked_tokens")} == {
        name: expected[name] for name in ("eval_loss", "eval_masked_tokens")
    }


# Older releases of transformers refuse the second on a CPU.
@pytest.mark.parametrize("cast", ["bf16_full_eval", pytest.param("fp16_full_eval", marks=pytest.mark.slow)])
def test_an_evaluation_in_half_precision_leaves_what_is_trained_as_it_is(settings, cast):
    settings |= {"do_train": True, "do_eval": True, "stop_after_n_steps": 2, "lora_dropout": 0.0}
    other = settings | {"output_dir": settings["output_dir"] + "-other", cast: True}
    assert run(settings) == 0 and run(other) == 0
    ours, expected = weights(other), weights(settings)
    assert all(ours[key].dtype == torch.float32 and torch.equal(ours[key], expected[key]) for key in expected)
    assert results(other)["before_loss"] == results(settings)["before_loss"]
    assert results(other)["eval_loss"] == pytest.approx(results(settings)["eval_loss"], abs=0.05)


def test_padding_free_trains_to_the_same_weights_as_padding(settings):
    """The same texts and masks, laid out otherwise; and to others than no training at all."""
    settings |= {"do_train": True, "line_by_line": True, "lora_dropout": 0.0, "stop_after_n_steps": 3}
    packed = settings | {"output_dir": settings["output_dir"] + "-packed", "padding_free": True}
    assert run(settings) == 0 and run(packed) == 0
    padded, packed = weights(settings), weights(packed)
    assert all(torch.allclose(packed[key], padded[key], atol=2e-4) for key in padded)
    assert all(padded[key].abs().max() > 0.01 for key in padded if "lora_B" in key)  # where it starts is zero


@pytest.mark.parametrize("kind", some_slow(["jsonl", "csv", "stream", "folder"], lambda kind: kind in ("csv", "folder")))
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
    chunks = data.tokenize(texts["train"], "train", tokenizer, data_settings, training).sequences
    line = tokenizer(Path(settings["train_file"]).read_text())["input_ids"]
    assert len(chunks) == len(line) // 50
    assert [i for row in chunks["input_ids"] for i in row] == line[: len(chunks) * 50]


def test_a_share_is_held_out_if_there_is_no_validation_file(settings):
    settings |= {"do_eval": True, "do_train": True, "validation_file": None, "validation_split_percentage": 20}
    settings |= {"stop_after_n_steps": 1, "line_by_line": True, "per_device_eval_batch_size": 4}
    assert run(settings) == 0
    seen = results(settings)["eval_samples_per_second"] * results(settings)["eval_runtime"]
    assert seen == pytest.approx(51, abs=1)  # 52 of 260 lines, one of them blank


def test_masks_do_not_depend_on_the_batch(settings):
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    collator = RepeatableCollator(tokenizer, seed=7)

    def masked(size, number=0):
        made = batches(settings, lambda rows: collator([{"input_ids": row, "pass": number} for row in rows]), 32, size)
        parts = [[batch[key][batch["attention_mask"].bool()] for key in ("input_ids", "labels")] for batch in made]
        return [torch.cat(part).tolist() for part in zip(*parts)]

    first = masked(8)
    assert first == masked(3) == masked(1)
    assert first != masked(8, number=1)


@pytest.mark.slow
@pytest.mark.skipif(TRANSFORMERS < Version("4.46"), reason="transformers reads no Q4_1 GGUF file there")
def test_real_weights_from_gguf_learn(real_weights, settings, tmp_path):
    """SmolLM2 on Python's own help texts: worse when made bidirectional, and on its way back after three steps."""
    from pydoc_data.topics import topics

    path = tmp_path / "topics.txt"
    path.write_text("\n".join(" ".join(text.split()) for text in list(topics.values())[:12]))
    settings |= {"model_name_or_path": str(real_weights), "gguf_file": next(real_weights.glob("*.gguf")).name}
    settings |= {"train_file": str(path), "validation_file": None, "validation_split_percentage": 25}
    settings |= {"max_seq_length": 64, "max_eval_samples": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    assert run(settings, "--do_train", "--do_eval", "--stop_after_n_steps=3") == 0
    found = results(settings)
    assert found["causal_loss"] + 0.5 < found["before_loss"]
    assert found["eval_loss"] + 0.2 < found["before_loss"]
    assert is_marked(settings["output_dir"])


@pytest.mark.slow
def test_two_processes_train_and_evaluate_what_one_does(settings, tmp_path):
    """With an evaluation before, after which accelerate would leave each to its own gradients."""
    path = Path(settings["output_dir"]).with_suffix(".json")
    write_pairs(tmp_path / "pairs.csv")
    settings |= {"eval_sts": str(tmp_path / "pairs.csv")}
    settings |= {"do_train": True, "do_eval": True, "stop_after_n_steps": 6, "lora_dropout": 0.0, "lora_r": 4}
    settings |= {"per_device_train_batch_size": 4}
    alone = settings | {"gradient_accumulation_steps": 2, "output_dir": settings["output_dir"] + "-alone"}
    path.write_text(json.dumps(settings))
    out = "".join(in_two_ranks("-m", "bidirect_patch", "mntp", path))
    assert out.count("after 6 steps") == 1
    assert run(alone) == 0
    ours, expected = weights(settings), weights(alone)
    assert all(torch.allclose(ours[key], expected[key], atol=1e-5) for key in expected)
    for name in ("causal_sts_spearman", "eval_sts_spearman"):
        assert results(settings)[name] == pytest.approx(results(alone)[name], abs=1e-3)


# DeepSpeed compiles its own all-reduce for CPUs, which takes two minutes, or waits without end where a run that was killed has
# left a lock. Where it can't be compiled, gloo's is taken.
UNDER_DEEPSPEED = """
import sys
import deepspeed
from bidirect_patch.cli import main
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_under_deepspeed_train_the_same_adapter(settings, tmp_path):
    """ZeRO-2 on CPUs gives what one process gives, and its checkpoints are resumed from."""
    pytest.importorskip("deepspeed", reason="deepspeed isn't installed")
    settings |= {"do_train": True, "do_eval": True, "stop_after_n_steps": 4, "lora_dropout": 0.0}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    alone = settings | {"gradient_accumulation_steps": 2, "output_dir": settings["output_dir"] + "-alone"}
    zero = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
    zero |= {"zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": 8, "train_batch_size": 16}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings))
    for flags in (["--stop_after_n_steps=2"], []):
        in_two_ranks("-c", UNDER_DEEPSPEED, "mntp", path, "--deepspeed", tmp_path / "zero.json", *flags)
    assert run(alone) == 0
    ours, expected = weights(settings), weights(alone)
    assert all(torch.allclose(ours[key], expected[key], atol=1e-6) for key in expected)


def test_what_it_says_to_do_next_can_be_done(place, settings, tmp_path, capsys):
    """The command that it prints trains, and the line of Python that this prints encodes."""
    st = pytest.importorskip("sentence_transformers", "6", reason="the next step needs the extra [simcse]")
    assert run(settings, "--do_train", "--max_steps", "1") == 0
    wrote, following = capsys.readouterr().out.splitlines()[-2:]
    assert wrote == f"Wrote the adapter of {settings['model_name_or_path']} to {settings['output_dir']}"
    encoder = str(tmp_path / "encoder")
    given = {"TEXTS": settings["train_file"], "ENCODER": encoder}
    command, *argv = [given.get(word, word) for word in shlex.split(following.removeprefix("Next: "))]
    assert command == "bidirect-patch"
    small = ["--max_train_samples", "20", "--max_steps", "1", "--use_cpu", "--report_to", "none"]
    assert main([*argv, *small, "--cache_dir", settings["cache_dir"]]) == 0
    wrote, following = capsys.readouterr().out.splitlines()[-2:]
    assert wrote == f"Wrote the encoder, whole, to {encoder}"
    names = {"SentenceTransformer": st.SentenceTransformer, "enable_bidirectional": enable_bidirectional}
    names["texts"] = ["w1 w2", "w3"]
    line = following.removeprefix("Next: from Python: ")
    assert eval(line, names).shape == (2, 32)
    assert is_bidirectional(eval(line.removesuffix(".encode(texts)"), names))


def test_no_next_command_is_given_where_the_adapter_does_not_fit_the_base_as_it_is(settings, capsys):
    assert run(settings, "--do_train", "--max_steps", "1", "--mask_token_type", "mask") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "Next: open it with its own tokenizer and revision: see MNTP in bidirect_patch/cli/README.md"
    )
