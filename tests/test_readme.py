"""The README tells the truth: its example runs, and its files and commands exist."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from nn_backprop.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_stands_below_it():
    code, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.S).groups()
    output = StringIO()
    with redirect_stdout(output):
        exec(code, {})
    rows = [line.rsplit(maxsplit=1) for line in output.getvalue().splitlines()]
    shown = [line.rsplit(maxsplit=1) for line in printed.splitlines()]
    assert [row[0] for row in rows] == [row[0] for row in shown]
    for _, difference in rows + shown:  # rounding differs between processors; its size does not
        assert 0 <= float(difference) < 1e-14


def test_every_file_that_it_names_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    names = [link for link in links if "://" not in link]
    tree = re.search(r"```\n(nn_backprop/\n.*?)```", README, re.S).group(1)
    folder = ""
    for line in tree.splitlines():
        if line.startswith(" " * 3):  # goes on
            continue
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        names.append(folder + name if line.startswith(" ") else name)
    assert len(names) > 15
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_every_source_file_stands_in_the_tree():
    tree = re.search(r"```\n(nn_backprop/\n.*?)```", README, re.S).group(1)
    package = ROOT / "nn_backprop"
    names = [path.name for path in package.iterdir() if not path.name.startswith("__pycache__")]
    hidden = {"__init__.py", "py.typed"}
    assert [name for name in names if name not in hidden and name not in tree] == []


def test_the_two_commands_stand_on_lines_of_their_own():
    lines = README.splitlines()
    assert "python -m pip install -e . && python experiments/train.py" in lines
    assert 'python -m pip install -e ".[test]" && python -m pytest' in lines


def test_the_story_of_a_wrong_gradient_goes_as_told(tmp_path, monkeypatch, capsys):
    """The file is checked, answers what stands there, is mended as it says, and passes."""
    section = README[README.index("## Is my gradient right?") :]
    code, answer = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", section, re.S).groups()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    assert main(["check", "mine.py:scale"]) == 1
    assert capsys.readouterr().out.startswith(answer)
    (tmp_path / "mine.py").write_text(code.replace(".mean(0)", ".sum(0)"))
    assert main(["check", "mine.py:scale"]) == 0
    assert capsys.readouterr().out.startswith("PASS")
