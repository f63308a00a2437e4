"""The script for mutation testing, on a made-up module: a mutant that its test kills, one that survives, one that hangs."""

import argparse
import ast
import gc
import os

import pytest

from benchmarks import mutants
from benchmarks.mutations import mutants_of

pytestmark = pytest.mark.slow  # the same on every release of transformers

SOURCE = '''"""A docstring."""


def raised(x: "int", least=0):
    if x < least:
        return least
    while x > 9 and True:
        x -= 1
    return x
'''
TEST = "from made_up import raised\n\ndef test_it():\n    assert raised(-3) == 0 and raised(5) == 5 and raised(11) == 9\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    (tmp_path / "made_up.py").write_text(SOURCE)
    (tmp_path / "test_made_up.py").write_text(TEST)
    monkeypatch.setattr(mutants, "PACKAGE", "made_up")
    yield tmp_path
    gc.unfreeze()


def options(**given):
    return argparse.Namespace(**{"share": 1.0, "most": None, "seed": 0, "lines": [], "verbose": False, **given})


def run(folder, **given):
    path = folder / "made_up.py"
    return mutants.tested(path, "made_up", path.name, (str(folder / "test_made_up.py"),), options(**given))


def test_a_mutant_is_killed_by_a_test_or_survives(folder, capsys):
    result = run(folder, lines=[5, 6, 9])
    assert (result.run, result.killed) == (3, 2)
    (survivor,) = result.survivors
    assert (survivor.line, survivor.text, survivor.change) == (5, "if x < least:", "Lt -> LtE")
    assert "made_up.py:5: if x < least:\n    Lt -> LtE    [SURVIVES]" in capsys.readouterr().out
    assert result.row["share"] == "67%"


def test_an_equivalent_mutant_is_not_run(folder, monkeypatch):
    monkeypatch.setattr(mutants, "EQUIVALENT", {("made_up.py", "if x < least:", "Lt -> LtE"): "the same number either way"})
    result = run(folder, lines=[5])
    assert (result.run, result.equivalent, result.survivors) == (0, 1, [])


def test_a_mutant_that_hangs_is_killed(folder):
    (endless,) = [mutant for mutant in mutants_of(SOURCE) if mutant.change == "x -= 1 -> pass"]
    path = folder / "made_up.py"
    changed = mutants.Changed("made_up", path, compile(endless.tree(), str(path), "exec"))
    found = mutants.in_a_fork(changed, [str(folder / "test_made_up.py")], {}, 5)
    assert found.killed and found.killer == "too slow"


def test_tests_that_fail_without_a_change_are_told_of(folder):
    (folder / "test_made_up.py").write_text(TEST.replace("== 9", "== 8"))
    with pytest.raises(SystemExit, match="fails without any change: .*::test_it"):
        run(folder)


def test_the_mutants_of_a_source():
    found = [(mutant.line, mutant.change) for mutant in mutants_of(SOURCE)]
    assert found == [
        (4, "0 -> 1"),
        (5, "Lt -> LtE"),
        (6, "return least -> return None"),
        (7, "x > 9 and True -> not (x > 9 and True)"),
        (7, "And -> Or"),
        (7, "Gt -> GtE"),
        (7, "9 -> 10"),
        (7, "True -> False"),
        (8, "Sub -> Add"),
        (8, "x -= 1 -> pass"),
        (8, "1 -> 2"),
        (9, "return x -> return None"),
    ]


@pytest.mark.parametrize(
    "source, change, mutated",
    [
        ("if not a: b()", "not a -> a", "if a:\n    b()"),
        ("x = [i for i in y if i > 1]", "Gt -> GtE", "x = [i for i in y if i >= 1]"),
        ("for i in y:\n    break", "Break -> Continue", "for i in y:\n    continue"),
        ("f('a', b < c)\ng(b < d)", "Lt -> LtE", "f('a', b <= c)\ng(b < d)"),
        ("x = a in b", "In -> NotIn", "x = a not in b"),
        ("del x[a]", "del x[a] -> pass", "pass"),
        ("def f(a):\n    a = g(a)\n    return a", "a = g(a) -> pass", "def f(a):\n    pass\n    return a"),
    ],
)
def test_a_change_is_made_at_its_place_alone(source, change, mutated):
    first = next(mutant for mutant in mutants_of(source) if mutant.change == change)
    assert ast.unparse(first.tree()) == mutated
    assert ast.unparse(first.source) == ast.unparse(ast.parse(source)), "the original is as it was"


@pytest.mark.parametrize(
    "source",
    ["raise E(f'{a} at 1')", "x: int = y", "def f(a: 'T') -> 'U': pass", "T = TypeVar('T')", "assert a < 1", "'text'", "x = y"],
)
def test_what_no_test_should_see_is_left_alone(source):
    assert [mutant.change for mutant in mutants_of(source)] in ([], [f"{ast.unparse(ast.parse(source))} -> pass"])


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one():
    all_of_them = mutants_of(SOURCE)
    few, more, share = (mutants.chosen(all_of_them, options(**o), "a") for o in ({"most": 3}, {"most": 6}, {"share": 0.5}))
    assert len(few) == 3 and len(more) == len(share) == 6 and few == mutants.chosen(all_of_them, options(most=3), "a")
    assert {id(m) for m in few} < {id(m) for m in more}
    assert [m.line for m in more] == sorted(m.line for m in more)


def test_each_equivalent_mutant_is_one_of_its_file():
    for name, tests in mutants.TESTS.items():
        made = {(name, m.text, m.change) for m in mutants_of((mutants.ROOT / mutants.PACKAGE / name).read_text())}
        assert {key for key in mutants.EQUIVALENT if key[0] == name} <= made
        for test in tests:
            assert (mutants.ROOT / test.split("::")[0]).exists()
    assert {key[0] for key in mutants.EQUIVALENT} <= set(mutants.TESTS) and all(mutants.EQUIVALENT.values())
