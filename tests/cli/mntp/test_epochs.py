"""Masks of each pass over the texts, wherever the batches are made."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ...helpers.mntp_runs import run

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")

PASSES = 4
MASKED = [[1, 4, 6, 9], [7, 10, 12, 13, 14, 16], [4, 8, 17, 18]]  # places in each of three passes


@pytest.fixture
def seen(monkeypatch):
    """The inputs and labels of every batch that a run trains on."""
    from bidirect_patch.cli.mntp.trainer import MNTPTrainer

    batches = []
    stock = MNTPTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        batches.append((inputs["input_ids"].tolist(), inputs["labels"].tolist()))
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MNTPTrainer, "compute_loss", compute_loss)
    return batches


@pytest.fixture
def five_texts(settings, tmp_path):
    """Settings to train on five texts, one a batch, in four passes."""
    lines = [line for line in Path(settings["train_file"]).read_text().splitlines() if len(line.split()) > 20][:5]
    path = tmp_path / "five.txt"
    path.write_text("\n".join(lines) + "\n")
    settings |= {"train_file": str(path), "validation_file": None, "do_train": True, "line_by_line": True}
    return settings | {"num_train_epochs": PASSES, "per_device_train_batch_size": 1, "seed": 3}


def masks_by_text(batches):
    """For each text, what was masked in it, in the order of training."""
    found = {}
    for (ids,), (labels,) in batches:
        text = tuple(label if label != -100 else token for token, label in zip(ids, labels))
        found.setdefault(text, []).append(labels)
    return found


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2},  # which does not divide the 5 batches of a pass
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "gradient_accumulation_steps": 2},
        pytest.param({"mlm_probability": (0.1, 0.9)}, marks=pytest.mark.slow),
    ],
)
def test_each_pass_has_masks_of_its_own(five_texts, seen, how):
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    assert run(five_texts | how) == 0
    found = masks_by_text(seen)
    tokenizer = AutoTokenizer.from_pretrained(five_texts["model_name_or_path"])
    collator = RepeatableCollator(tokenizer, mlm_probability=(five_texts | how)["mlm_probability"], seed=five_texts["seed"])
    assert len(found) == 5
    for text, masks in found.items():
        expected = [collator([{"input_ids": text, "pass": number}])["labels"][0].tolist() for number in range(PASSES)]
        # Where the accumulation does not divide a pass, 4.44 stops within the last one, and 4.47 and 4.48 one pass earlier.
        assert masks == expected[: len(masks)] and len(masks) >= PASSES - 2
        assert len(set(map(tuple, expected))) == PASSES


def test_every_pass_is_in_an_order_of_its_own(five_texts, seen):
    assert run(five_texts) == 0
    texts = [tuple(label if label != -100 else token for token, label in zip(*ids, *labels)) for ids, labels in seen]
    orders = [tuple(texts[start : start + 5]) for start in range(0, 5 * PASSES, 5)]
    assert len({tuple(sorted(order)) for order in orders}) == 1 and len(set(orders)) > 1


@pytest.mark.parametrize("files", [1, 2])
def test_a_stream_with_more_workers_than_files_ends(five_texts, seen, tmp_path, files):
    """A file is what one worker reads. A worker that gets none has nothing to go through."""
    lines = Path(five_texts["train_file"]).read_text().splitlines()
    paths = [tmp_path / f"part{number}.txt" for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text("\n".join(lines[number::files]) + "\n")
    five_texts |= {"train_file": list(map(str, paths)), "streaming": True, "dataloader_num_workers": 3}
    assert run(five_texts | {"stop_after_n_steps": 12}) == 0
    found = masks_by_text(seen)
    assert len(found) == 5 and len(seen) == 12
    assert all(len(set(map(tuple, masks))) == len(masks) for masks in found.values())


def test_the_shares_of_one_text_are_spread_over_the_range_from_pass_to_pass(five_texts):
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    tokenizer = AutoTokenizer.from_pretrained(five_texts["model_name_or_path"])
    collator = RepeatableCollator(tokenizer, mlm_probability=(0.2, 0.8), seed=0)
    batch = collator([{"input_ids": [i % 60 + 4 for i in range(1000)], "pass": number} for number in range(100)])
    shares = (batch["labels"][:, 1:] != -100).float().mean(1).sort().values
    assert shares[0] < 0.25 and shares[-1] > 0.75
    assert (shares - torch.linspace(0.2, 0.8, 100)).abs().max() < 0.6 * 0.16  # Kolmogorov's bound, passed once in a hundred


def test_a_number_gives_the_masks_of_a_pass_that_it_always_gave(five_texts):
    """Recorded before there were ranges."""
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    tokenizer = AutoTokenizer.from_pretrained(five_texts["model_name_or_path"])
    collator = RepeatableCollator(tokenizer, mlm_probability=0.3, seed=5)
    batch = collator([{"input_ids": list(range(5, 25)), "pass": number} for number in range(3)])
    assert [row.nonzero().flatten().tolist() for row in batch["labels"] != -100] == MASKED
