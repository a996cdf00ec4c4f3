"""`python -m nn_backprop check`, `compare` and `export`: what they print, and their exit codes."""

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nn_backprop import compare_gradients, rules
from nn_backprop.__main__ import main
from nn_backprop.check import KINDS
from nn_backprop.check.arrays import load
from nn_backprop.check.gallery import EXAMPLES, gallery
from nn_backprop.rules.export import example

RULES = {rule.name: rule for rule in rules.TABLE.values()}
FACTORIES = """
import numpy as np
import torch
from torch import nn

from nn_backprop.check.gallery import EXAMPLES

print("imported")
X = torch.arange(15.0).reshape(3, 5)


def right():
    print("made")
    return torch.sin, (torch.randn(3, 5),)


def raising():
    return nn.Linear(3, 5)(torch.randn(3, 7))


class Namespace:
    inner = staticmethod(right)


number = 7
wrong = lambda: (EXAMPLES["sign"][0], [torch.randn(3, 5), torch.randn(3, 5)])
other_than_the_reference = lambda: (torch.sin, (X,), torch.cos)
refusing = lambda: ((np.square, lambda grad, x: 1 / 0), X)
pair = lambda: ((np.sin, lambda grad, x: grad * np.cos(x)), (np.ones((3, 5)),))
shapes = lambda: (nn.Linear(3, 5), (torch.randn(3, 7),))
nan = lambda: (torch.log, (-torch.ones(3),))
integers = lambda: (torch.sin, (torch.arange(3),))
def needy(x): return torch.sin, (x,)
seven = lambda: 7
four = lambda: (torch.sin, (torch.ones(3),), None, None)
no_inputs = lambda: (torch.sin, "x")
no_reference = lambda: (torch.sin, (X,), 7)
no_target = lambda: (7, (X,))
"""
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty working directory, which is not importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def mine() -> str:
    """A new module in the working directory."""
    name = f"mine{next(NUMBERS)}"
    Path(f"{name}.py").write_text(FACTORIES)
    return name


def printed(capsys, *arguments: object, code: int = 0) -> str:
    """What the command says on stdout."""
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def sentence(capsys, *arguments: object) -> str:
    """The one line that the command says when it could not be run, after what the user's code
    printed."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    *theirs, last = output.err.splitlines()
    assert output.out == "" and last.startswith("nn_backprop: ")
    assert set(theirs) <= {"imported", "made"}
    return last


# ---- check ----------------------------------------------------------------------------------


def test_a_right_gradient(mine, capsys, tmp_path):
    Path("folder").mkdir()
    Path("folder/main_part.py").write_text("from beside import also")
    Path("folder/beside.py").write_text(f"from {mine} import right as also")
    for where in (
        *(f"{mine}:{name}" for name in ("Namespace.inner", "pair")),
        "folder/main_part.py:also",
        f"{tmp_path / 'folder' / 'main_part.py'}:also",
    ):
        assert printed(capsys, "check", where).startswith("PASS")
    found = json.loads(printed(capsys, "check", f"{mine}:right", "--second-order", "--json"))
    assert found["ok"] and found["verdict"] == "pass"
    assert "second derivative" in {probe["name"] for probe in found["probes"]}


def test_a_wrong_gradient_and_an_inconclusive_one(mine, capsys):
    for name, says in [
        ("refusing", "the backward raised ZeroDivisionError: division by zero"),
        ("other_than_the_reference", "the forward itself is not the reference's"),
    ]:
        out = printed(capsys, "check", f"{mine}:{name}", code=1)
        assert out.startswith("FAIL") and says in out
    first, again, other = (
        printed(capsys, "check", f"{mine}:wrong", "--seed", seed, code=1) for seed in (1, 1, 2)
    )
    assert first == again != other and "cause: sign" in first
    assert "NaN" in printed(capsys, "check", f"{mine}:nan", code=3)


def test_json_is_all_that_is_on_stdout(mine, capsys):
    found = {
        name: json.loads(printed(capsys, "check", f"{mine}:{name}", "--json", code=code))
        for name, code in {"wrong": 1, "shapes": 2, "nan": 3}.items()
    }
    assert found["wrong"]["causes"][0]["kind"] == "sign"
    assert found["shapes"]["error"].startswith("RuntimeError: ")
    assert found["nan"]["verdict"] == "inconclusive"


def test_what_cannot_be_checked(mine, capsys):
    for name, says in [
        ("shapes", "Linear: the target could not be run: RuntimeError: mat1 and mat2"),
        ("integers", "none of the inputs is a floating-point tensor"),
        ("raising", "raises RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("needy", "raises TypeError: needy() missing 1 required positional argument: 'x'"),
        ("seven", "returns int; it has to return (target, inputs) or (target, inputs, reference)"),
        ("four", "returns tuple of length 4; it has to"),
        ("no_inputs", "returns str as the inputs; it has to"),
        ("no_reference", "the reference is an int; it has to be a callable"),
        ("no_target", "the target is an int; it has to be an nn.Module"),
        ("Namespace", "is a class; it has to be a function without arguments"),
        ("number", "is of type int; it has to be a function without arguments"),
        ("missing", "there is no 'missing' in mine"),
        ("Namespace.missing", "there is no 'Namespace.missing' in mine"),
        ("", "is neither package.module:name nor file.py:name"),
    ]:
        assert says in sentence(capsys, "check", f"{mine}:{name}")
    line = 1 + FACTORIES.splitlines().index("    return nn.Linear(3, 5)(torch.randn(3, 7))")
    assert sentence(capsys, "check", f"{mine}:raising").endswith(f"({mine}.py, line {line})")


def test_what_cannot_be_imported(mine, capsys):
    Path("broken.py").write_text("import nothing_at_all")
    Path("syntax.py").write_text("def f(:")
    Path("leaving.py").write_text("raise SystemExit(3)")
    for where, says in [
        (mine, "is neither"),
        ("nowhere:f", "there is no module 'nowhere' here"),
        ("nowhere.part:f", "there is no module 'nowhere' here"),
        (f"{mine}.part:f", f"there is no module '{mine}.part'"),
        ("nowhere.py:f", "there is no file nowhere.py"),
    ]:
        assert says in sentence(capsys, "check", where)
    for name, says in (
        ("broken", "ModuleNotFoundError: No module named 'nothing_at_all' (broken.py, line 1)"),
        ("syntax", "SyntaxError: invalid syntax (syntax.py, line 1)"),
        ("leaving", "SystemExit: 3 (leaving.py, line 1)"),
    ):
        for place in (name, f"{name}.py"):
            said = sentence(capsys, "check", f"{place}:f")
            assert said.endswith(f"{place} cannot be imported: {says}")
    for arguments in ([], ["a:b", "--gallery"]):
        says = sentence(capsys, "check", *arguments)
        assert "either package.module:name or --gallery" in says


def test_from_a_shell(mine):
    command = [sys.executable, "-m", "nn_backprop", "check", f"{mine}:wrong", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (1, "fail")
    assert done.stderr == "imported\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and all(name in shown for name in ("check", "compare", "export"))


# ---- check --gallery ------------------------------------------------------------------------


def test_the_gallery_has_every_kind_and_each_is_named(capsys, monkeypatch):
    assert EXAMPLES.keys() == KINDS.keys() - {"unknown"}
    examples = list(gallery())
    for kind, source, report in examples:
        assert report.verdict == "fail" and report.causes[0].kind == kind, report
        assert source.startswith("class ") and len(source.splitlines()) < 25
    monkeypatch.setattr("nn_backprop.check.gallery.gallery", lambda: iter(examples))
    page = printed(capsys, "check", "--gallery")
    heads = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert heads == list(EXAMPLES) and page.count("```") == 4 * len(heads) + 2
    committed = Path(__file__).parents[1] / "experiments" / "results" / "gallery" / "README.md"
    for kind in heads:
        assert f"\ncause: {kind}: " in page and f"The gradient {KINDS[kind]}." in page
    rows = json.loads(printed(capsys, "check", "--gallery", "--json"))
    assert [row["kind"] for row in rows] == heads
    written = committed.read_text(encoding="utf-8")  # the reports may differ in a digit elsewhere
    assert all(row["source"] in page and row["source"] in written for row in rows)
    assert all(row["report"]["causes"] for row in rows)
    # One that is named wrongly.
    examples[0] = (examples[0][0], *examples[1][1:])
    printed(capsys, "check", "--gallery", code=1)


# ---- export ---------------------------------------------------------------------------------


def test_an_example_of_every_rule(capsys):
    """The gradients in the file are those that autograd has of the forward."""
    for name, rule in RULES.items():
        out = printed(capsys, "export", name, "out.npz", "--seed", 3)
        arrays = load("out.npz")
        assert all(key in out for key in arrays)
        arguments, leaves = {}, {}
        for key, array in arrays.items():
            word, _, operand = key.partition("/")
            assert array.dtype == np.float64 or word in ("label", "option")
            if word in ("input", "parameter"):
                leaves[operand] = arguments[operand] = torch.from_numpy(array).requires_grad_()
            elif word == "label":
                arguments[operand] = torch.from_numpy(array)
            elif word == "option":
                value = array.tolist()
                value = getattr(torch, value) if isinstance(value, str) else value
                arguments[operand] = tuple(value) if isinstance(value, list) else value
        assert {f"grad/{leaf}" for leaf in leaves} == {k for k in arrays if k.startswith("grad/")}
        bound = inspect.signature(rule.forward).bind(**arguments)
        bound.apply_defaults()
        torch.manual_seed(3)
        z, _ = rule.forward(*bound.args)
        assert np.array_equal(z.detach().double().numpy(), arrays["output/0"])
        upstream = torch.from_numpy(arrays["upstream/0"]).to(z)
        grads = torch.autograd.grad(z, list(leaves.values()), upstream)
        report = compare_gradients(dict(zip(leaves, grads, strict=True)), arrays)
        assert report.ok, (name, report)


def test_an_example_depends_on_the_seed_only():
    state = torch.get_rng_state()
    first, again, other = (example(RULES["dropout"], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["input/x"], other["input/x"])


def test_what_cannot_be_exported(capsys):
    Path("folder.npz").mkdir()
    for rule, name, says in [
        ("liner", "out.npz", "there is no rule 'liner'; there are linear, "),
        *(("linear", f"out{end}", "end in .npz") for end in (".txt", "", ".safetensors")),
        ("linear", "nowhere/out.npz", "there is no folder nowhere"),
        ("linear", "folder.npz", "folder.npz is not written: "),
    ]:
        assert says in sentence(capsys, "export", rule, name)
    assert [path.name for path in Path().iterdir()] == ["folder.npz"]


def test_an_old_file_survives_a_failure(capsys, monkeypatch):
    printed(capsys, "export", "linear", "out.npz")
    before = Path("out.npz").read_bytes()

    def full(*arguments, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    says = sentence(capsys, "export", "relu", "out.npz")
    assert "out.npz is not written: No space left on device" in says
    assert Path("out.npz").read_bytes() == before and len(list(Path().iterdir())) == 1


# ---- compare --------------------------------------------------------------------------------


@pytest.fixture
def exported() -> dict[str, np.ndarray]:
    """An example of linear, in theirs.npz too."""
    arrays = example(RULES["linear"])
    np.savez("theirs.npz", **arrays)
    return arrays


def test_compare_with_an_export(exported, capsys):
    grads = {n: exported[f"grad/{n}"] for n in ("x", "weight", "bias")}
    np.savez("mine.npz", **{name: grad.astype(np.float32) for name, grad in grads.items()})
    assert printed(capsys, "compare", "mine.npz", "theirs.npz").startswith("PASS  mine.npz against")
    # With what the export knows beside the gradients, the mistake can be told.
    np.savez(
        "mine.npz", **grads | {"weight": exported["upstream/0"].T @ exported["output/0"][:, :5]}
    )
    assert "FAIL" in printed(capsys, "compare", "mine.npz", "theirs.npz", code=1)
    np.savez("mine.npz", **grads | {"bias": exported["upstream/0"].mean(0)})
    out = printed(capsys, "compare", "mine.npz", "theirs.npz", "--json", code=1)
    found = json.loads(out)
    assert found["causes"][0]["kind"] in ("scale", "wrong-reduction")
    assert [t["verdict"] for t in found["tensors"]] == ["pass", "pass", "fail"]


def test_compare_with_a_context_of_its_own(exported, capsys):
    np.savez("expected.npz", x=exported["grad/x"])
    np.savez("mine.npz", x=exported["upstream/0"] @ exported["parameter/weight"] / 7)
    for options in ([], ["--context", "theirs.npz"]):
        out = printed(capsys, "compare", "mine.npz", "expected.npz", *options, code=1)
        assert ("7" in out.partition("gradient")[0]) and "cause: scale" in out
    np.savez("mine.npz", x=np.zeros((3, 5)))
    np.savez("expected.npz", x=np.zeros((3, 5)))
    assert "no power" in printed(capsys, "compare", "mine.npz", "expected.npz", code=3)


def test_a_missing_name_is_1(exported, capsys):
    np.savez("mine.npz", x=exported["grad/x"], weight=exported["grad/weight"])
    assert "grad_bias is missing" in printed(capsys, "compare", "mine.npz", "theirs.npz", code=1)
    assert "grad_bias is given" in printed(capsys, "compare", "theirs.npz", "mine.npz", code=1)


def test_what_cannot_be_compared(exported, capsys):
    good = Path("theirs.npz").read_bytes()
    Path("text.npz").write_text("text")
    Path("nothing.npz").touch()
    Path("short.npz").write_bytes(good[:-200])
    flipped = bytearray(good)
    flipped[300] ^= 1
    Path("flipped.npz").write_bytes(flipped)
    Path("text.safetensors").write_text("text")
    Path("folder.npz").mkdir()
    Path("file.txt").touch()
    with open("single.npz", "wb") as file:
        np.save(file, np.ones(3))
    np.savez("objects.npz", x=np.array([None, {}], dtype=object))
    np.savez("empty.npz")
    np.savez("words.npz", x=np.array(["a"]))
    np.savez("complex.npz", x=np.array([1j]))
    np.savez("unknown.npz", thing=np.ones(3))
    for name, says in {
        "nowhere.npz": "there is no file nowhere.npz",
        "folder.npz": "there is no file folder.npz",
        "file.txt": "file.txt is neither an .npz nor a .safetensors file",
        "text.npz": "text.npz cannot be read as .npz: ",
        "nothing.npz": "nothing.npz cannot be read as .npz: ",
        "short.npz": "short.npz cannot be read as .npz: ",
        "flipped.npz": "flipped.npz cannot be read as .npz: ",
        "single.npz": "single.npz cannot be read as .npz: it is a single array",
        "text.safetensors": "text.safetensors cannot be read as .safetensors: ",
        "objects.npz": "objects.npz holds Python objects under 'x', which are not read",
        "empty.npz": "empty.npz holds no arrays",
        "words.npz": "'x' is of type <U1; it has to be an array of real numbers",
        "complex.npz": "'x' is of type complex128; it has to be",
    }.items():
        assert says in sentence(capsys, "compare", name, "theirs.npz")
        assert says in sentence(capsys, "compare", "theirs.npz", name)
    says = sentence(capsys, "compare", "theirs.npz", "theirs.npz", "--context", "unknown.npz")
    assert "the context has 'thing'; it may have inputs, " in says
