"""The README tells the truth: its examples run, and its files and commands exist."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from nn_backprop.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "tests/README.md", *ROOT.glob("experiments/**/README.md")]
# A block of Python, and what it prints.
STORY, BACKPROP, NUMPY = re.findall(r"```python\n(.*?)```.*?```\n(.*?)```", README, re.S)


def printed(code: str) -> str:
    output = StringIO()
    with redirect_stdout(output):
        exec(code, {})
    return output.getvalue()


def test_backprop_prints_what_stands_below_it():
    code, shown = BACKPROP
    rows = [line.rsplit(maxsplit=1) for line in printed(code).splitlines()]
    expected = [line.rsplit(maxsplit=1) for line in shown.splitlines()]
    assert [row[0] for row in rows] == [row[0] for row in expected]
    for _, difference in rows + expected:  # rounding differs between processors; its size does not
        assert 0 <= float(difference) < 1e-14


def test_the_check_of_numpy_functions_prints_what_stands_below_it():
    code, shown = NUMPY
    assert printed(code).startswith(shown)


def test_the_story_of_a_wrong_gradient_goes_as_told(tmp_path, monkeypatch, capsys):
    """The file is checked, answers what stands there, is mended, and passes."""
    code, answer = STORY
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    assert main(["check", "mine.py:scale"]) == 1
    assert capsys.readouterr().out.startswith(answer)
    (tmp_path / "mine.py").write_text(code.replace(".mean(0)", ".sum(0)"))
    assert main(["check", "mine.py:scale"]) == 0
    assert capsys.readouterr().out.startswith("PASS")


def test_the_end_of_a_derivation_is_that_of_the_rule(capsys):
    shown = re.search(r"```\n(Backward:\n.*?)```", README, re.S).group(1)
    assert main(["rules", "batch_norm"]) == 0
    assert shown in capsys.readouterr().out


def test_every_link_of_every_page_leads_somewhere():
    missing = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not missing
    assert len(PAGES) > 15


def test_the_tree_has_every_wing_and_nothing_else():
    tree = re.search(r"```\n(nn_backprop/\n.*?)```", README, re.S).group(1)
    wings = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    there = {path.name for path in (ROOT / "nn_backprop").iterdir()}
    hidden = {"__init__.py", "__pycache__", "py.typed"}
    assert wings == there - hidden


def test_the_two_commands_stand_on_lines_of_their_own():
    lines = README.splitlines()
    assert "python -m pip install -e . && python experiments/train.py" in lines
    assert 'python -m pip install -e ".[test]" && python -m pytest' in lines


def test_the_front_door_is_short():
    assert len(README.split()) <= 1600
