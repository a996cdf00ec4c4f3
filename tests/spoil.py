"""Would the tests notice? Spoils rules, engines and oracles, one place at a time.

    python tests/spoil.py                     # all of it: half an hour on two cores
    python tests/spoil.py rules --each 1      # one wing, one change a function
    python tests/spoil.py --json mine.jsonl   # a line for each change, to compare with another tree
    python tests/spoil.py --again mine.jsonl  # only what survived there

A change is one of an expression: + for −, × for ÷, a factor exchanged, a condition turned round, a
number that is one too large, `sum` for `mean`, a gradient that is dropped. The tests are collected
once; each change is made in a forked process, in the code of the function itself, so that every
table that holds it sees it, and the tests of its wing run there until one fails. A change that no
test notices survives; some are no mistakes (a message's wording, a faster path to the same
numbers), so that the survivors are to be read, not counted.
"""

import argparse
import ast
import copy
import gc
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))

# Packages whose functions are spoilt, and the test files that have to notice.
WINGS = {
    "rules": (
        ["nn_backprop.rules"],
        ["rules", "rules_any_size", "independent", "function", "backprop", "random_networks",
         "tape"],
    ),
    "engines": (
        [f"nn_backprop.{prefix}{name}" for prefix in ("", "engines.")
         for name in ("tape", "replay", "by_hand", "by_hand_fast", "function")],
        ["tape", "tape_refusals", "replay", "by_hand", "function", "backprop",
         "random_networks", "engines"],
    ),
    "oracle": (
        [f"nn_backprop.check.{name}" for name in ("oracle", "kinks", "rounding", "judge")],
        ["check", "check_oracle", "check_verdict", "check_probes", "check_target", "check_in_use"],
    ),
}  # fmt: skip
EXCHANGED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
METHODS = {"sum": "mean", "mean": "sum", "max": "min", "min": "max", "amax": "amin", "abs": "neg"}
LONGEST = 600  # processor seconds of a change; one that takes longer is noticed by anybody


class Change(NamedTuple):
    """One spoilt place."""

    wing: str
    function: str
    text: str  # before → after

    @property
    def rule(self) -> str:
        """Of conv2d_backward, conv2d."""
        return self.function.rpartition("_")[0]


def functions(packages: list[str]) -> Iterator[tuple[str, FunctionType]]:
    """(name, function) of all functions and methods in these modules or packages, unwrapped."""
    modules = []
    for package in packages:
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        modules.append(module)
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{package}."):
            if found.name != "nn_backprop.rules.export":  # it writes files, and derives nothing
                modules.append(importlib.import_module(found.name))
    seen = set()
    for module in dict.fromkeys(modules):
        for name, value in vars(module).items():
            members = vars(value).items() if inspect.isclass(value) else [("", value)]
            for member, one in members:
                one = one.fget if isinstance(one, property) else getattr(one, "__func__", one)
                if not inspect.isroutine(one) or getattr(one, "__module__", "") != module.__name__:
                    continue
                own = inspect.unwrap(one)
                if isinstance(own, FunctionType) and own not in seen:
                    seen.add(own)
                    yield f"{name}.{member}".rstrip("."), own


def spoilt(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one change, for each change that there is."""
    if isinstance(node, ast.BinOp):
        other = copy.copy(node)
        if isinstance(node.op, ast.MatMult):
            other.left, other.right = node.right, node.left
            yield other
        elif type(node.op) in EXCHANGED:
            other.op = EXCHANGED[type(node.op)]()
            yield other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in EXCHANGED:
        other = copy.copy(node)
        other.ops = [EXCHANGED[type(node.ops[0])](), *node.ops[1:]]
        yield other
    elif isinstance(node, ast.BoolOp):
        other = copy.copy(node)
        other.op = EXCHANGED[type(node.op)]()
        yield other
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in METHODS:
            other = copy.copy(node)
            other.func = ast.Attribute(node.func.value, METHODS[node.func.attr], ast.Load())
            yield other
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        for k in range(len(node.value.elts)):
            parts = [ast.Constant(None) if i == k else e for i, e in enumerate(node.value.elts)]
            yield ast.Return(ast.Tuple(parts, ast.Load()))


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else super().generic_visit(node)


def changes(function: FunctionType) -> list[tuple[str, Any]]:
    """(before → after, the changed code) of one function, in an order that its place in a file does
    not change."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(source)
    except (OSError, SyntaxError):
        return []
    (definition,) = tree.body
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    definition.decorator_list = []
    definition.returns = None
    annotations = {id(n) for a in ast.walk(definition) if isinstance(a, (ast.arg, ast.AnnAssign))
                   and a.annotation for n in ast.walk(a.annotation)}  # fmt: skip
    defaults = {id(n) for d in [*definition.args.defaults, *definition.args.kw_defaults] if d
                for n in ast.walk(d)}  # fmt: skip
    messages = {id(n) for r in ast.walk(definition) if isinstance(r, (ast.Raise, ast.JoinedStr))
                for n in ast.walk(r)}  # fmt: skip
    found = []
    for node in list(ast.walk(definition)):
        if id(node) in annotations | defaults | messages:
            continue
        for new in spoilt(node):
            before, after = ast.unparse(node), ast.unparse(new)
            line = f"{' '.join(before.split())[:60]} → {' '.join(after.split())[:60]}"
            changed = ast.unparse(_with(definition, node, new))
            code = compile(changed, inspect.getsourcefile(function) or "", "exec")
            inner = next(
                c for c in code.co_consts if getattr(c, "co_name", "") == function.__name__
            )
            if inner.co_freevars == function.__code__.co_freevars:
                found.append((line, inner))
    return sorted(found, key=lambda change: hashlib.sha256(change[0].encode()).hexdigest())


def _with(definition: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of the definition in which a node is another."""
    place = [n is old for n in ast.walk(definition)].index(True)
    twin = copy.deepcopy(definition)
    target = list(ast.walk(twin))[place]
    return _Replace(target, new).visit(twin)


def _stem(path: Path) -> str:
    return path.stem.removeprefix("test_")


class Spoiler:
    """A pytest plugin that, once the tests are collected, runs them for each change."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session: Any) -> bool:
        gc.freeze()  # so that a forked process does not copy what is only looked at
        kills: Counter[str] = Counter()
        waiting = list(self.planned())
        running: dict[int, tuple[Change, int]] = {}
        total, survived, done = len(waiting), 0, 0
        print(f"{total} changes, {len(session.items)} tests", file=sys.__stdout__, flush=True)
        with open(self.options.json, "w", encoding="utf-8") as file:
            while waiting or running:
                while waiting and len(running) < self.options.workers:
                    change, function, code = waiting.pop(0)
                    items = self.relevant(session.items, change, kills)
                    read, write = os.pipe()
                    if not (pid := os.fork()):
                        self.child(items, function, code, write)
                    os.close(write)
                    running[pid] = change, read
                pid, status = os.wait()
                change, read = running.pop(pid)
                with os.fdopen(read) as pipe:
                    noticed = pipe.read() or (f"ended by {status}" if status else "")
                kills[noticed.partition("[")[0]] += 1
                done, survived = done + 1, survived + (not noticed)
                json.dump({**change._asdict(), "noticed": noticed}, file, ensure_ascii=False)
                file.write("\n")
                file.flush()
                if not noticed or done % 20 == 0:
                    line = f"{done}/{total} {change.function}: {change.text}: "
                    print(line + (noticed or "SURVIVED"), file=sys.__stdout__, flush=True)
        print(f"{total - survived} of {total} noticed", file=sys.__stdout__, flush=True)
        return True

    def planned(self) -> Iterator[tuple[Change, FunctionType, Any]]:
        """Each change that is to be tried, the function, and its code when it is made."""
        wanted = None
        if self.options.again:
            lines = [json.loads(line) for line in Path(self.options.again).read_text().splitlines()]
            wanted = {(of["function"], of["text"]) for of in lines if not of["noticed"]}
        for wing in self.options.wings:
            for name, function in functions(WINGS[wing][0]):
                found = changes(function)
                if wanted is None:
                    found = found[: self.options.each]
                for text, code in found:
                    if wanted is None or (name, text) in wanted:
                        yield Change(wing, name, text), function, code

    def relevant(self, items: list[Any], change: Change, kills: Counter[str]) -> list[Any]:
        """Of the wing's files, those of the same rule first, then what noticed most so far."""
        files = WINGS[change.wing][1]
        mine = [item for item in items if _stem(item.path) in files]

        def place(item: Any) -> tuple[bool, int, int]:
            other = not (change.wing == "rules" and change.rule and change.rule in item.nodeid)
            often = kills[item.nodeid.partition("[")[0]]
            return other, -often, files.index(_stem(item.path))

        return sorted(mine, key=place)

    def child(self, items: list[Any], function: FunctionType, code: Any, write: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        function.__code__ = code
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                break
        os.write(write, self.failed.encode())
        os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wings", nargs="*", default=list(WINGS), help=", ".join(WINGS))
    parser.add_argument("--each", type=int, default=3, help="changes of a function, at most")
    parser.add_argument("--json", default="spoilt.jsonl", help="a line for each change")
    parser.add_argument("--again", help="a file of --json: only what survived there")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    names = {name for wing in options.wings for name in WINGS[wing][1]}
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if _stem(path) in names]
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=no", *files]
    return pytest.main(arguments, plugins=[Spoiler(options)])


if __name__ == "__main__":
    sys.exit(main())
