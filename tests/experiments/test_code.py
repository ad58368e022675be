"""Which changes of code ask for a rerun."""

from __future__ import annotations

from understudy.experiments.code import OF_EXPERIMENTS, OF_RUNS, PACKAGE, _statements

SOURCE = '''
"""Module."""
RATE = 1.0
"""Docstring of a constant."""

def pipeline(x):
    """Docstring."""
    return x + 1  # comment

def analyse(records):
    return len(records)

def _later():
    return 2
'''


def test_comments_docstrings_and_spacing_change_nothing():
    plain = (
        "RATE = 1.0\ndef pipeline(x):\n  return x+1\ndef analyse(records): return len(records)\ndef _later(): return 2"
    )
    assert _statements(SOURCE) == _statements(plain)


def test_what_a_function_does_is_a_change():
    assert _statements(SOURCE) != _statements(SOURCE.replace("x + 1", "x + 2"))
    assert _statements(SOURCE) != _statements(SOURCE.replace("1.0", "2.0"))


def test_what_only_reads_results_may_change():
    changed = SOURCE.replace("len(records)", "0").replace("return 2", "return 3")
    assert _statements(SOURCE) != _statements(changed)
    assert _statements(SOURCE, until="analyse") == _statements(changed, until="analyse")
    assert _statements(SOURCE, until="analyse") == ["RATE = 1.0", "def pipeline(x):\n    return x + 1"]


def test_the_listed_modules_exist():
    assert [name for name in (*OF_RUNS, *OF_EXPERIMENTS) if not (PACKAGE / f"{name}.py").is_file()] == []
