"""`python -m benchmarks.gpu`: its dry run, its tables and time limits."""

import contextlib
import types

import pytest
import torch
from packaging.version import Version

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import progress, timing

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
    for row in ("FlashAttention 2", "SDPA cuDNN", "flex, compiled", "1x12"):
        assert row in begins
    for way in ("| flash_attention_4 | padding_free |", "| LoRA | 2x12 | ours |", "| ours | flex_attention | padded |"):
        assert way in text


def test_without_a_gpu_the_script_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--parts", "kernels,other"], ["--parts", ""]])
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
