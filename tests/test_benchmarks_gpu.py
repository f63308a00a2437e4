"""`python -m benchmarks.gpu`: its dry run, its tables and time limits, and the arithmetic of the ladder."""

import contextlib
import types

import numpy as np
import pytest
import torch
from packaging.version import Version

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import carried, ladder, progress, sts, timing
from bidirect_patch import is_bidirectional

from .helpers.tiny_models import tiny_model
from .helpers.versions import TRANSFORMERS

CPU = torch.device("cpu")
on_the_cards_release = pytest.mark.skipif(
    TRANSFORMERS < Version("5.17"), reason="the script is for the transformers of the GPU's machine, 5.17"
)


def make_run(lines, seconds=100.0, **options):
    return progress.Run(CPU, True, progress.Deadline(seconds), lines.append, types.SimpleNamespace(**options))


@pytest.mark.slow
@on_the_cards_release
def test_the_dry_run_runs_every_part(tmp_path, capsys):
    output = tmp_path / "tables.md"
    assert gpu.main(["--dry-run", "--output", str(output)]) == 0
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert "No problem." in text and "Left out" not in text
    for title, *_ in gpu.PARTS.values():
        assert f"\n### {title}\n" in text
    begins = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    for row in ("FlashAttention 2", "SDPA cuDNN", "flex, compiled", "1x12", "+ MNTP", "causal + SimCSE"):
        assert row in begins
    for way in ("| flash_attention_4 | padding_free |", "| LoRA | 2x12 | ours |", "| ours | flex_attention | padded |"):
        assert way in text


def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--parts", "kernels,other"], ["--parts", ""], ["--prepare", "folder"]])
def test_options_that_do_not_fit_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--dry-run", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


# --- tables and time ---


def test_rows_are_written_as_they_come():
    lines = []
    table = make_run(lines).table("a", "b")
    assert lines[0].splitlines()[-1] == "| --- | --- |"
    table.add("x|y")
    assert lines[1] == "| x/y |  |"
    with pytest.raises(ValueError, match="3 cells"):
        table.add(1, 2, 3)


def test_parts_share_the_time_and_one_that_fails_does_not_stop_the_next(monkeypatch):
    shares, lines = [], []

    def fails(run):
        shares.append(run.deadline.left())
        raise RuntimeError("no kernel\nimage")

    def runs(run):
        shares.append(run.deadline.left())

    monkeypatch.setattr(gpu, "PARTS", {"one": ("One", fails, 10), "two": ("Two", runs, 30)})
    options = types.SimpleNamespace(parts=["one", "two"], dry_run=True)
    assert gpu.run_parts(options, progress.Deadline(40), lines.append) == ["one: RuntimeError: no kernel"]
    assert shares == pytest.approx([10, 40], abs=1)  # what the first did not use goes to the second


def test_what_there_is_no_time_for_is_named():
    lines = []
    run = make_run(lines, seconds=5)
    assert run.allows("one", 4) and not lines
    assert not run.allows("two", 6)
    assert "Left out" in lines[0] and lines[0].endswith("two")


def test_a_way_that_fails_is_a_cell_and_the_others_are_measured():
    run = make_run([])
    calls = []

    @contextlib.contextmanager
    def good():
        yield lambda: calls.append("good")

    @contextlib.contextmanager
    def bad():
        yield lambda: 1 / 0

    found = timing.take_turns(run, {"bad": bad, "good": good}, rounds=2)
    assert found["bad"].problem.startswith("ZeroDivisionError") and run.problems
    assert len(found["good"].seconds) == 2 and len(calls) == 5  # three to warm up
    assert timing.over(found, "good", "bad") == ""
    assert timing.over(found, "good", "good") == "1.00 / 1.00 / 1.00"


def test_no_round_begins_when_the_time_is_over():
    @contextlib.contextmanager
    def way():
        yield lambda: None

    assert len(timing.take_turns(make_run([], seconds=-1), {"a": way}, rounds=5)["a"].seconds) == 1


# --- the ladder ---


def test_what_was_carried_is_what_was_prepared(tmp_path):
    texts = carried.Texts.of([[1, 2, 3], [], [65_535]])
    assert [text.tolist() for text in texts] == [[1, 2, 3], [], [65_535]]
    with pytest.raises(ValueError, match="65536 is too large"):
        carried.Texts.of([[65_536]])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(25_000))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "part-099").write_text("of an earlier run")
    parts = carried._pack(folder, tmp_path / "parts", 10_000)
    assert [path.name for path in parts] == ["part-000", "part-001", "part-002"]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [path.name for path in parts]
    assert max(path.stat().st_size for path in parts) == 10_000
    with carried.unpacked(tmp_path / "parts") as back:
        assert (back / "noise").read_bytes() == (folder / "noise").read_bytes()
    with pytest.raises(FileNotFoundError, match="--prepare"), carried.unpacked(folder):
        pass


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy isn't installed")
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=50), generator.integers(0, 5, 50)
    assert sts.spearman(a + b, b) == pytest.approx(stats.spearmanr(a + b, b).statistic)
    assert sts.spearman(np.array([1, 2, 3]), np.array([1, 20, 300])) == pytest.approx(1)


def test_embeddings_are_those_of_each_text_alone(monkeypatch):
    monkeypatch.setattr(sts, "BATCH_TOKENS", 12)
    decoder = tiny_model(head=False)
    texts = carried.Texts.of([[5, 6, 7, 8], [9], [10, 11, 12, 13, 14], [15, 16], [17, 18]])
    found = sts.embed(decoder, texts, 0, CPU)
    for i, text in enumerate(texts):
        with torch.no_grad():
            hidden = decoder(torch.from_numpy(text)[None], use_cache=False).last_hidden_state[0]
        weights = torch.arange(1, len(text) + 1)[:, None]
        torch.testing.assert_close(found["mean"][i], hidden.mean(0), atol=1e-5, rtol=1e-5)
        weighted = (hidden * weights).sum(0) / weights.sum()
        torch.testing.assert_close(found["weighted mean"][i], weighted, atol=1e-5, rtol=1e-5)


def test_batches_take_each_text_once_an_epoch():
    batches = ladder.shuffled(7, 3)
    first, second = [np.concatenate([next(batches), next(batches)]) for _ in range(2)]
    assert len(set(first)) == len(set(second)) == 6 and first.tolist() != second.tolist()
    with pytest.raises(ValueError, match="2 texts"):
        next(ladder.shuffled(2, 3))


def test_training_learns_merges_and_stops_in_time():
    pytest.importorskip("peft", reason="peft isn't installed")
    model = tiny_model()
    ids = torch.randint(3, 61, (4, 8), generator=torch.Generator().manual_seed(0))
    names = {name for name, _ in model.named_parameters()}

    def losses():
        while True:
            yield lambda: model(ids, labels=ids, use_cache=False).loss

    with torch.no_grad():
        before = float(model(ids, labels=ids).loss)
    trained = ladder.train(make_run([]), model, losses(), rate=3e-2, steps=30, seconds=1000)
    assert trained.steps == 30 and trained.loss < 0.8 * before
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 0.8 * before  # what was learned is in the merged weights
    assert {name for name, _ in model.named_parameters()} == names and not is_bidirectional(model)
    assert ladder.train(make_run([]), model, losses(), 3e-2, 30, seconds=0).steps == ladder.TIMED_STEPS
