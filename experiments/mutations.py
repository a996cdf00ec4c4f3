"""Does the gradient checker find what is wrong, name it, and leave right gradients alone?

    python experiments/mutations.py --workers 2    # the catalogue and 10,000 right gradients
    python experiments/mutations.py --smoke        # a few of each, a minute

First, every mistake of `catalogue`, `unseen_dense` and `unseen_spatial` in `nn_backprop.check`:
what `check_gradients` says of it, held against the kinds of cause that were written down beforehand
as right names, and what `torch.autograd.gradcheck` (which names nothing) says, in its slow and its
fast mode, with its default tolerances and the same data in float64. Names count on the mistakes
unseen: no hypothesis was written with them. Then right gradients: the equivalents, and random
configurations of this project's rules, of torch's functions and modules and of NumPy pairs, of
which none may be called wrong. Configuration i is drawn from the seed i alone.
"""

import collections
import copy
import json
import math
import multiprocessing
import operator
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call
from tqdm import tqdm

from nn_backprop import as_function, figures, rules
from nn_backprop.check import Report, catalogue, check_gradients, unseen_dense, unseen_spatial
from nn_backprop.check.target.target import ForwardRaised, Target, seeded
from nn_backprop.studies.evidence import Claim, markdown_table, write_results
from nn_backprop.tracking import default_run_dir, describe_machine

Row = dict[str, Any]

UNSEEN = (*unseen_dense.MUTANTS, *unseen_spatial.MUTANTS)
MUTANTS = (*catalogue.MUTANTS, *UNSEEN)
# The mistakes by what their names are evidence of, with the words for them in tables.
PARTS = {
    "unseen": "of the mistakes unseen",
    "read": "of the half that was held out until its misses were read",
    "fit": "of the half the hypotheses were written with",
}

# What this project promises: shares of all mistakes, of the unseen ones, of right gradients.
CAUGHT, NAMED, NAMED_AMONG_THREE, FALSE_ALARMS = 1.0, 0.80, 0.95, 0.0


@dataclass(frozen=True)
class Options:
    """Wrong gradients caught and named; right gradients left alone."""

    configurations: int = 10_000
    """Number of random configurations that are right."""
    first: int = 0
    """The number of the first of them."""
    catalogue: bool = True
    """Whether the catalogue is gone through as well."""
    workers: int = 1
    """Processes, of one thread each."""
    smoke: bool = False
    """A tenth of the catalogue and 40 configurations."""


def main(options: Options) -> int:
    began = time.perf_counter()
    if options.workers < 1 or options.configurations < 0:
        print("mutations.py: --workers must be 1 or more, --configurations 0 or more",
              file=sys.stderr)  # fmt: skip
        return 2
    torch.set_num_threads(1)
    folder = default_run_dir("mutations", "smoke" if options.smoke else "full")
    folder.mkdir(parents=True)
    names = ["mutant"] * len(MUTANTS) + ["equivalent"] * len(catalogue.EQUIVALENTS)
    numbers = [*range(len(MUTANTS)), *range(len(catalogue.EQUIVALENTS))]
    in_catalogue = [*zip(names, numbers, strict=True)][:: 10 if options.smoke else 1]
    last = options.first + (40 if options.smoke else options.configurations)
    tasks: list[Task] = [*in_catalogue] if options.catalogue else []
    tasks += [("configuration", number) for number in range(options.first, last)]

    found: dict[str, list[Row]] = {"mutant": [], "equivalent": [], "configuration": []}
    alarms = folder / "alarms.txt"
    for (kind, _), row in tqdm(_carried_out(tasks, options.workers), total=len(tasks)):
        found[kind].append(row)
        if kind == "configuration" and row["verdict"] == "fail":
            text = f"configuration {row['number']}: {row['description']}\n{row['report']}\n"
            tqdm.write(text)
            with alarms.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
    mutants, equivalents, right = (
        sorted(rows, key=operator.itemgetter("number")) for rows in found.values()
    )

    tables: dict[str, list[Row]] = {}
    if mutants:
        tables["Caught and named"] = _summary(mutants, equivalents, right)
        tables["By family"] = _by_family(mutants)
    if right:
        tables["Right gradients"] = _by_kind(right)
    if mutants:
        tables["Every mistake"] = [_shown(row) for row in mutants]
        tables["Every equivalent"] = [_shown(row) for row in equivalents]
    text = "\n".join(f"**{title}**\n\n{markdown_table(r)}" for title, r in tables.items() if r)
    (folder / "results.md").write_text(text, encoding="utf-8")
    claims = _claims(mutants, equivalents, right, options)
    seconds = time.perf_counter() - began
    rows = [{"table": title, **row} for title, part in tables.items() for row in part]
    write_results(
        folder / "results.json",
        "mutations",
        asdict(options),
        rows,
        claims,
        describe_machine(),
        seconds,
    )
    with (folder / "configurations.jsonl").open("w", encoding="utf-8") as file:
        for row in right:
            file.write(json.dumps({k: v for k, v in row.items() if k != "report"}) + "\n")
    if mutants:
        figures.save(_figure(mutants), folder / "results.png")
    for title in ("Caught and named", "By family", "Right gradients"):
        if title in tables:
            print(f"{title}\n\n{markdown_table(tables[title])}")
    for claim in claims:
        low, high = claim.interval
        print(f"{claim.verdict}: {claim.claim}; measured {100 * claim.measured:.2f} % "
              f"[{100 * low:.2f}, {100 * high:.2f}]")  # fmt: skip
    print(f"Tables, picture and results.json: {folder}")
    return 0


# --- The work, in one process or several --------------------------------------------------------

Task = tuple[str, int]


def _carried_out(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Row]]:
    """Each task with what it found, in any order."""
    if workers == 1:
        yield from map(_carry_out, tasks)
        return
    spawned = multiprocessing.get_context("spawn")
    with spawned.Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(_carry_out, tasks, chunksize=4)


def _carry_out(task: Task) -> tuple[Task, Row]:
    kind, number = task
    with warnings.catch_warnings():  # what the targets warn of is not in question
        warnings.simplefilter("ignore")
        if kind == "configuration":
            return task, _check_configuration(number)
        of = MUTANTS if kind == "mutant" else catalogue.EQUIVALENTS
        return task, {"number": number} | _check_mutant(of[number])


def _check_mutant(mutant: catalogue.Mutant) -> Row:
    """What each checker says of it, on its data and, where there are such, where it hides."""
    target, inputs = mutant.make()
    began = time.perf_counter()
    report = check_gradients(target, *inputs, second_order=mutant.second_order)
    seconds = time.perf_counter() - began
    kinds = [cause.kind for cause in report.causes[:3]]
    row: Row = {
        "name": mutant.name,
        "family": mutant.family,
        "part": _part(mutant),
        "right kinds": mutant.kinds,
        "verdict": report.verdict,
        "causes": kinds,
        "place": next((n for n, kind in enumerate(kinds, 1) if kind in mutant.kinds), None),
        "seconds": seconds,
    }
    for mode in ("slow", "fast"):
        began = time.perf_counter()
        row[mode] = _gradcheck(*mutant.make(), mode == "fast", mutant.second_order)
        row[f"{mode} seconds"] = time.perf_counter() - began
    if mutant.hides is not None:
        target, inputs = mutant.hides()
        row["hidden"] = check_gradients(target, *inputs).verdict
        for mode in ("slow", "fast"):
            row[f"hidden {mode}"] = _gradcheck(*mutant.hides(), mode == "fast", False)
    return row


def _part(mutant: catalogue.Mutant) -> str:
    if mutant in UNSEEN:
        return "unseen"
    return "fit" if mutant in catalogue.fit() else "read"


Outcome = Literal["caught", "passed", "not run"]


def _gradcheck(target: Any, inputs: tuple, fast: bool, second_order: bool) -> Outcome:
    """torch's own checker on the same data in float64; a module's parameters are inputs too."""
    given = [_leaf(x) for x in inputs]
    if isinstance(target, nn.Module):
        module = copy.deepcopy(target).double()
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        given += [_leaf(dict(module.named_parameters())[name].detach()) for name in names]

        def function(*args: Any) -> Any:
            torch.manual_seed(0)  # gradcheck has no seed for what a target draws
            count = len(args) - len(names)
            parameters = dict(zip(names, args[count:], strict=True))
            return functional_call(module, parameters, args[:count])

    else:
        call = _callable(target)

        def function(*args: Any) -> Any:
            torch.manual_seed(0)
            return call(*args)

    try:
        function(*given)
    except Exception:
        return "not run"
    try:
        gradcheck(function, given, fast_mode=fast)
        if second_order:
            gradgradcheck(function, given, fast_mode=fast)
    except ValueError:  # it refuses the inputs
        return "not run"
    except (GradcheckError, RuntimeError, TypeError):  # or the backward raised
        return "caught"
    return "passed"


def _leaf(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().clone().requires_grad_()
    return x


def _check_configuration(number: int) -> Row:
    """The full check, probes and all, of a right gradient."""
    began = time.perf_counter()
    call = configuration(number)
    row: Row = {"number": number, "kind": call.kind, "name": call.name,
                "precision": call.precision, "description": call.description}  # fmt: skip
    try:
        report = check_gradients(
            call.target, *call.args, seed=call.seed, second_order=call.second_order, **call.kwargs
        )
    except Exception as error:  # counts as an alarm too: the target can be run
        reason = f"check_gradients raised {type(error).__name__}: {error}"
        report = Report(call.name, "fail", reason)
    row |= {
        "verdict": report.verdict,
        "reason": _reason(report),
        "probes": collections.Counter(probe.outcome for probe in report.probes),
        "seconds": time.perf_counter() - began,
    }
    return row | ({"report": str(report)} if report.verdict == "fail" else {})


def _reason(report: Report) -> str:
    """Why a check was inconclusive, in a few words that several can have in common."""
    if report.verdict != "inconclusive":
        return report.reason
    text = re.sub(r"^grad_\S+: ", "", report.reason)
    return re.sub(r" in output.*| of its largest.*", "", text.split(":")[0])


# --- The tables ---------------------------------------------------------------------------------

CHECKERS = {"ours": "verdict", "gradcheck": "slow", "gradcheck, fast mode": "fast"}


def _is_caught(outcome: str) -> bool:
    return outcome in ("fail", "caught")


def _named(rows: Iterable[Row]) -> list[str]:
    """How the name given to each mistake was: the parts of a whole."""
    return [
        "not caught" if not _is_caught(row["verdict"])
        else "first cause right" if row["place"] == 1
        else "second or third right" if row["place"]
        else "unknown" if row["causes"][:1] in ([], ["unknown"])
        else "wrong"
        for row in rows
    ]  # fmt: skip


def _summary(mutants: list[Row], equivalents: list[Row], right: list[Row]) -> list[Row]:
    rows = []

    def add(measure: str, of: Sequence[Row], keys: Iterable[str]):
        shares = [_share(sum(_is_caught(r[k]) for r in of), len(of)) if k else "–" for k in keys]
        rows.append({"": f"{measure} ({len(of)})", **dict(zip(CHECKERS, shares, strict=True))})

    def add_names(measure: str, of: Sequence[Row], words: Sequence[str]):
        count = sum(word in words for word in _named(of))
        rows.append(
            {"": f"{measure} ({len(of)})", "ours": _share(count, len(of)),
             "gradcheck": "none", "gradcheck, fast mode": "none"}
        )  # fmt: skip

    add("mistakes caught", mutants, CHECKERS.values())
    rows.append({"": f"not run, or no verdict ({len(mutants)})"} | {
        name: str(sum(row[key] in ("not run", "inconclusive") for row in mutants))
        for name, key in CHECKERS.items()
    })  # fmt: skip
    for key, which in PARTS.items():
        part = [row for row in mutants if row["part"] == key]
        if part:
            add_names(f"{which}: the first cause is right", part, ["first cause right"])
            add_names(
                f"{which}: one of the first three is",
                part,
                ["first cause right", "second or third right"],
            )
            add_names(f"{which}: first cause `unknown`, none right", part, ["unknown"])
            first = sum(_first_is_wrong(row) for row in part)
            rows.append({"": f"{which}: first cause wrong and not `unknown` ({len(part)})",
                         "ours": _share(first, len(part)), "gradcheck": "none",
                         "gradcheck, fast mode": "none"})  # fmt: skip
    hidden = [row for row in mutants if "hidden" in row]
    if hidden:
        add("mistakes found on data where the gradient comes out right", hidden,
            ["hidden", "hidden slow", "hidden fast"])  # fmt: skip
    if equivalents:
        add("right but unusual gradients called wrong", equivalents, CHECKERS.values())
    if right:
        add("right gradients drawn at random called wrong", right, ["verdict", "", ""])
    rows.append({"": "seconds a mistake, median", **{
        name: f"{statistics.median(row[key] for row in mutants):.3f}"
        for name, key in zip(CHECKERS, ("seconds", "slow seconds", "fast seconds"), strict=True)
    }})  # fmt: skip
    return rows


def _first_is_wrong(row: Row) -> bool:
    return bool(row["causes"]) and row["place"] != 1 and row["causes"][0] != "unknown"


def _by_family(mutants: list[Row]) -> list[Row]:
    rows = []
    for family, members in _grouped(mutants, "family").items():
        row: Row = {"family": family, "mistakes": len(members)}
        for name, key in CHECKERS.items():
            row[f"caught by {name}"] = sum(_is_caught(m[key]) for m in members)
        for key in PARTS:
            places = [m["place"] for m in members if m["part"] == key]
            row[f"{key}: first right"] = f"{places.count(1)} of {len(places)}"
            row[f"{key}: of three"] = f"{len(places) - places.count(None)} of {len(places)}"
        row["median s"] = f"{statistics.median(m['seconds'] for m in members):.3f}"
        rows.append(row)
    return rows


def _by_kind(right: list[Row]) -> list[Row]:
    """Right gradients, by what they are of and by precision."""
    reasons = collections.Counter(r["reason"] for r in right if r["verdict"] == "inconclusive")
    groups = {f"{kind}": part for kind, part in _grouped(right, "kind").items()}
    groups |= {f"in {kind}": part for kind, part in _grouped(right, "precision").items()}
    rows = []
    for name, part in (groups | {"all": right}).items():
        verdicts = collections.Counter(row["verdict"] for row in part)
        why = collections.Counter(r["reason"] for r in part if r["verdict"] == "inconclusive")
        rows.append({
            "configurations": name, "number": len(part), "pass": verdicts["pass"],
            "fail": verdicts["fail"], "fail, %": _share(verdicts["fail"], len(part)),
            "inconclusive": verdicts["inconclusive"],
            **{f"… {reason}": why[reason] for reason, _ in reasons.most_common()},
            "probes run": sum(r["probes"]["pass"] + r["probes"]["fail"] for r in part),
            "mean s": f"{statistics.fmean(row['seconds'] for row in part):.3f}",
        })  # fmt: skip
    return rows


def _shown(row: Row) -> Row:
    right = {1: "first", 2: "second", 3: "third"}.get(row["place"], "no")
    return {
        "name": row["name"].replace("|", "\\|"),
        "part": row["part"] if row["right kinds"] else "–",
        "right names": ", ".join(row["right kinds"]) or "–",
        "verdict": row["verdict"],
        "first cause": row["causes"][0] if row["causes"] else "–",
        "right?": right if row["right kinds"] else "–",
        "gradcheck": row["slow"],
        "fast mode": row["fast"],
        "where it hides": row.get("hidden", "–"),
        "s": f"{row['seconds']:.3f}",
    }


def _grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _share(count: int, total: int) -> str:
    low, high = _exact_interval(count, total)
    digits = 1 if total < 1000 else 3
    return (f"{count}: {100 * count / max(1, total):.{digits}f} % "
            f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]")  # fmt: skip


def _exact_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's (1934) interval of a share."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return low, high


def _claims(
    mutants: list[Row], equivalents: list[Row], right: list[Row], options: Options
) -> list[Claim]:
    """What the project promises of all mistakes; a part of them says nothing about that."""
    if options.smoke:
        return []
    names = _named(row for row in mutants if row["part"] == "unseen")
    first = names.count("first cause right")
    among_three = first + names.count("second or third right")
    alarms = sum(row["verdict"] == "fail" for row in (*equivalents, *right))
    counts = [
        ("mistakes caught", CAUGHT, sum(_is_caught(m["verdict"]) for m in mutants), len(mutants)),
        ("mistakes unseen: first cause right", NAMED, first, len(names)),
        ("mistakes unseen: one of three right", NAMED_AMONG_THREE, among_three, len(names)),
        ("right gradients called right", 1 - FALSE_ALARMS, len(right) + len(equivalents) - alarms,
         len(right) + len(equivalents)),
    ]  # fmt: skip
    claims = []
    for claim, promised, count, total in counts:
        if total:
            low, high = _exact_interval(count, total)
            verdict: Any = "undecided"
            if low >= promised:
                verdict = "reproduced"
            elif high < promised:
                verdict = "not reproduced"
            text = f"{claim}: {100 * promised:g} % or more (this project's promise)"
            claims.append(Claim(text, promised, count / total, (low, high), verdict))
    return claims


def _figure(mutants: list[Row]) -> Any:
    families = _grouped(mutants, "family")
    caught = {
        f"{family} ({len(members)})": {
            name: sum(_is_caught(m[key]) for m in members) / len(members)
            for name, key in CHECKERS.items()
        }
        for family, members in families.items()
    }
    parts = ("first cause right", "second or third right", "unknown", "wrong", "not caught")
    named = {}
    for keys, title in ((("unseen",), "names, unseen"), (("read", "fit"), "names, the others")):
        named[title] = {
            f"{family} ({len(members)})": collections.Counter(
                _named(m for m in members if m["part"] in keys)
            )
            for family, members in families.items()
        }
    return figures.rates_by_group(
        caught, named, parts, f"{len(mutants)} wrong gradients: caught, and named by our checker"
    )


# --- Right gradients, drawn at random -----------------------------------------------------------

# The exponents of ten of the scales; where the forward is not finite, the next is tried.
REACHES = (12.0, 6.0, 3.0, 1.0, 0.0)


@dataclass
class Call:
    """A target whose gradient is right, and what it is called with."""

    kind: str
    name: str
    target: Any
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    second_order: bool = False
    precision: str = ""

    @property
    def description(self) -> str:
        words = [_looks(a) for a in self.args]
        words += [f"{k}={_looks(v)}" for k, v in self.kwargs.items()]
        what = f"{self.target} " if isinstance(self.target, nn.Module) else ""
        mode = ""
        if isinstance(self.target, nn.Module):
            mode = ", training" if self.target.training else ", evaluation"
        more = ", second order" if self.second_order else ""
        return (
            f"{self.kind} {self.name}: {' '.join(what.split())}({', '.join(words)}), "
            f"seed {self.seed}{mode}{more}"
        )


def _looks(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(_looks, x))}]"
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor):
        return repr(x)
    kind = str(x.dtype).removeprefix("torch.")
    if not x.is_floating_point() or not x.numel():
        return f"{kind}{list(x.shape)}"
    strides = "" if x.is_contiguous() else f" strides {x.stride()}"
    return f"{kind}{list(x.shape)}{strides} |≤{x.abs().max().item():.2g}|"


@dataclass
class Constant:
    """A tensor argument that has no gradient: the target holds it rather than being handed it."""

    value: Tensor


def _holding(function: Callable, args: tuple) -> tuple[Callable, tuple]:
    """The function of those arguments alone that are not constants."""
    if not any(isinstance(a, Constant) for a in args):
        return function, args

    def held(*free: Any) -> Any:
        rest = iter(free)
        return function(*(a.value if isinstance(a, Constant) else next(rest) for a in args))

    held.__name__ = getattr(function, "__name__", "held")
    return held, tuple(a for a in args if not isinstance(a, Constant))


class Draw:
    """Random numbers, sizes, types and tensors of one configuration."""

    def __init__(self, seed: int, reach: float):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.reach = reach
        self.dtype = self.pick(
            *[torch.float64] * 48, *[torch.float32] * 44, *[torch.bfloat16] * 4,
            *[torch.float16] * 4,
        )  # fmt: skip
        if self.dtype == torch.float16:
            self.reach = min(reach, 3.0)

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, *choices: int) -> int:
        return self.pick(*(choices or (1, 2, 3, 4, 5, 7)))

    def shape(self, *ranks: int) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(self.pick(*(ranks or (1, 2, 3)))))

    def scale(self) -> float:
        reach = self.reach * self.random.uniform(-1, 1)
        return 10**reach if self.chance(0.6) else 1.0

    def values(self, shape: tuple[int, ...]) -> Tensor:
        """Of size about 1: normal; small integers, many of them equal or 0; half of them 0; all
        the same; close together far from 0."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.random.random()
        if kind < 0.20:
            x = (1.5 * x).round()
        elif kind < 0.28:
            x = x * (x > 0)
        elif kind < 0.32:
            x = torch.full(shape, x.flatten()[0].item() if x.numel() else 0.0, dtype=torch.float64)
        elif kind < 0.37:
            x = 10 + x
        return x

    def x(self, *shape: int) -> Tensor:
        return self.laid_out(self.values(shape) * self.scale())

    def unit(self, *shape: int) -> Tensor:
        """Of size about 1, whatever the scale of the rest."""
        return self.laid_out(self.values(shape))

    def positive(self, *shape: int) -> Tensor:
        return self.laid_out((0.1 + self.values(shape).abs()) * self.scale())

    def share(self, *shape: int) -> Tensor:
        """Between 0.05 and 0.95."""
        return self.laid_out(
            0.05 + 0.9 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        )

    def small(self, *shape: int) -> Tensor:
        """Of size about 1 or smaller."""
        return self.laid_out(self.values(shape) * min(1.0, self.scale()))

    def labels(self, *shape: int, classes: int, ignored: int | None = None) -> Tensor:
        y = torch.randint(classes, shape, generator=self.generator)
        if ignored is not None and y.numel() > 1:
            y.view(-1)[0] = ignored
        return y

    def index(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)

    def laid_out(self, x: Tensor) -> Tensor:
        """In the configuration's type, in a layout of its own."""
        x = x.to(self.dtype)
        how = self.pick("plain", "plain", "transposed", "every second", "expanded", "offset")
        if how == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "every second" and x.dim():
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if how == "expanded" and x.dim() and x.numel():
            axis = self.random.randrange(x.dim())
            return x.narrow(axis, 0, 1).expand(x.shape)
        if how == "offset":
            return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
        return x


def configuration(seed: int) -> Call:
    """The configuration of that number: of the scales tried, the largest with a gradient to check.
    Where there is none at any scale, as of a softmax over one class, others are drawn."""
    while True:
        for reach in REACHES:
            draw = Draw(seed, reach)
            kind = draw.pick(*["rule"] * 5, *["torch"] * 5, *["module"] * 5, "numpy",
                             "equivalent", "network")  # fmt: skip
            call = KINDS_OF_CALL[kind](draw)
            call.kind, call.seed = kind, draw.random.randrange(1000)
            call.precision = str(draw.dtype).removeprefix("torch.")
            if _has_gradient(call):
                return call
        seed += 10**9


def _has_gradient(call: Call) -> bool:
    """Whether outputs and gradients are finite, and a change of some value, by its own size or by
    1, moves the outputs by clearly more than their rounding, which grows as √K in sums of K."""
    target = Target(call.target, call.args, call.kwargs, seed=call.seed)
    try:
        with seeded(call.seed):
            outputs = [z.detach() for z in target.forward(target.leaves_of()[1])]
            upstream = [torch.randn_like(z) for z in outputs]
        grads = {name: g for name, g in target.gradients(upstream).items() if g is not None}
    except ForwardRaised:  # torch has no cdist, say, in half precision
        return False
    if not all(t.isfinite().all() for t in (*outputs, *grads.values())):
        return False
    rounding = max(
        torch.finfo(z.dtype).eps * (z * u).abs().max().item() if z.numel() else 0.0
        for z, u in zip(outputs, upstream, strict=True)
    )
    moves = [
        g.abs().max().item() * max(1.0, target.values[name].abs().max().item())
        for name, g in grads.items()
    ]
    half = target.dtype in (torch.bfloat16, torch.float16)  # summed in float32
    terms = 1 if half else max(t.numel() for t in (*outputs, *target.values.values()))
    return max(moves, default=0.0) > 32 * math.sqrt(terms) * rounding


def _callable(target: Any) -> Any:
    """What is called: of a Function, its apply."""
    return target.apply if isinstance(target, type) and issubclass(target, Function) else target


# --- Arguments of the callables that the rules stand for ----------------------------------------


def _linear(d: Draw) -> tuple:
    i, o = d.size(), d.size()
    lead = d.pick((), (d.size(),), (d.size(), d.size()), (d.size(1, 40),))
    if d.chance(0.1):
        return d.x(*lead, i), d.x(i), *(() if len(lead) == 1 else (d.x(),))
    return d.x(*lead, i), d.x(o, i), *d.pick((), (d.x(o),))


def _matmul(d: Draw) -> tuple:
    i, j, k, n = (d.size() for _ in range(4))
    return d.pick(
        lambda: (d.x(i, j), d.x(j, k)), lambda: (d.x(j), d.x(j)), lambda: (d.x(i, j), d.x(j)),
        lambda: (d.x(j), d.x(n, j, k)), lambda: (d.x(n, i, j), d.x(j)),
        lambda: (d.x(n, i, j), d.x(n, j, k)), lambda: (d.x(2, 1, i, j), d.x(n, j, k)),
    )()  # fmt: skip


def _conv(d: Draw, dims: int = 2, rule: bool = False) -> tuple:
    groups = d.pick(1, 1, 1, 2, 3)
    kernel = [d.size(1, 2, 3) for _ in range(dims)]
    dilation = [d.size(1, 1, 2, 3) for _ in range(dims)]
    padding = [d.size(0, 0, 1, 2) for _ in range(dims)]
    stride = [d.size(1, 1, 2, 3) for _ in range(dims)]
    size = [
        max(1, r * (k - 1) + 1 - 2 * p) + d.size(0, 1, 2, 3)
        for k, r, p in zip(kernel, dilation, padding, strict=True)
    ]
    c, o, n = d.size(1, 2, 3), d.size(1, 2, 3), d.pick((), (d.size(1, 2, 3),))
    x, weight = d.x(*n, c * groups, *size), d.x(o * groups, c, *kernel)
    return x, weight, d.pick(None, d.x(o * groups)), stride, padding, dilation, groups


def _pool(d: Draw, dims: int = 2) -> tuple[Tensor, list[int], list[int], list[int]]:
    kernel = [d.size(1, 2, 3) for _ in range(dims)]
    stride = [d.size(1, 2, 3) for _ in range(dims)]
    padding = [d.size(*range(k // 2 + 1)) for k in kernel]
    size = [max(2, k) + d.size(0, 1, 2, 3) for k in kernel]
    n = d.pick((), (d.size(1, 2, 3),))
    return d.x(*n, d.size(1, 2, 3), *size), kernel, stride, padding


def _max_pool(d: Draw) -> tuple:
    x, kernel, stride, padding = _pool(d)
    dilation = d.pick(1, 2) if min(x.shape[-2:]) > 2 * max(kernel) else 1
    return x, kernel, stride, padding, dilation, d.pick(False, True)


def _avg_pool(d: Draw) -> tuple:
    x, kernel, stride, padding = _pool(d)
    return x, kernel, stride, padding, d.pick(False, True), d.pick(False, True), d.pick(None, 5)


def _softmax(d: Draw) -> tuple:
    x = d.x(*d.shape())
    return x, d.random.randrange(-x.dim(), x.dim())


def _cross_entropy(d: Draw) -> tuple:
    n, c = d.size(), d.size(2, 3, 5, 7)
    more = d.pick((), (), (d.size(),))
    weight = d.pick(None, Constant(d.unit(c).abs() + 0.1))
    reduction = d.pick("mean", "sum", "none")
    smoothing = d.pick(0.0, 0.0, 0.3)
    if d.chance(0.2):
        y = torch.softmax(d.unit(n, c, *more).double(), 1).to(d.dtype)
        return d.x(n, c, *more), y, weight, None, -100, None, reduction, smoothing
    y = d.labels(n, *more, classes=c, ignored=d.pick(None, -100))
    return d.x(n, c, *more), y, weight, None, -100, None, reduction, smoothing


def _nll(d: Draw, pixels: bool = True) -> tuple:
    n, c = d.size(), d.size(2, 3, 5, 7)
    more = d.pick((), (), (d.size(), d.size())) if pixels else ()
    y = d.labels(n, *more, classes=c, ignored=d.pick(None, -100))
    return d.x(n, c, *more), y, None, None, -100, None, d.pick("mean", "sum", "none")


def _mse(d: Draw) -> tuple:
    shape = d.shape()
    return d.x(*shape), d.x(*shape), None, None, d.pick("mean", "sum", "none")


def _batch_norm(d: Draw) -> tuple:
    c, training = d.size(1, 2, 3, 5), d.chance(0.6)
    shape = d.pick((d.size(2, 3, 5, 7), c), (d.size(2, 3), c, d.size(2, 3, 5)), (2, c, 3, 2))
    running: tuple = (None, None)
    if not training or d.chance(0.5):
        # A running mean of stride 0 makes torch read beyond it for the weight's gradient.
        running = Constant(d.unit(c).contiguous()), Constant(d.unit(c).abs() + 0.1)
    affine = d.pick((None, None), (d.x(c), d.x(c)))
    return d.x(*shape), *running, *affine, training, 0.1, d.pick(1e-5, 0.1, 1e-3)


def _layer_norm(d: Draw) -> tuple:
    shape = (*d.shape(0, 1, 2), d.size(2, 3, 5, 7))
    axes = d.size(1, 2) if len(shape) > 1 else 1
    norm = shape[-axes:]
    affine = d.pick((None, None), (d.x(*norm), d.x(*norm)))
    return d.x(*shape), list(norm), *affine, d.pick(1e-5, 0.1)


def _broadcast(d: Draw, second: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    shape = d.shape(1, 2, 3)
    first = [d.pick(s, s, s, 1) for s in shape]
    other = [d.pick(s, s, s, 1) for s in shape][d.random.randrange(len(shape)) :]
    return d.x(*first), (second or d.x)(*other)


def _signed(d: Draw, *shape: int) -> Tensor:
    """Away from 0, of either sign."""
    x = d.positive(*shape)
    sign = torch.randint(2, x.shape, generator=d.generator) * 2 - 1
    return x * sign.to(x.dtype)


def _reshape(d: Draw) -> tuple:
    shape = d.shape(2, 3)
    return d.x(*shape), d.pick((-1,), (1, -1), tuple(reversed(shape)), (shape[0], -1))


def _reduction(d: Draw) -> tuple:
    x = d.x(*d.shape())
    axes = d.random.sample(range(x.dim()), d.random.randint(1, x.dim()))
    return x, *d.pick((), (axes,), (axes[0], True), (axes, d.pick(False, True)))


def _permute(d: Draw) -> tuple:
    x = d.x(*d.shape())
    return x, d.random.sample(range(x.dim()), x.dim())


def _x(d: Draw) -> tuple:
    return (d.x(*d.shape(0, 1, 2, 3)),)


def _squeeze(d: Draw) -> tuple:
    x = d.x(*d.shape(1, 2, 3))
    return x, *d.pick((), (d.random.randrange(x.dim()),))


ARGUMENTS: dict[Callable, Callable[[Draw], tuple]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    F.conv2d: _conv,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.relu: _x,
    F.leaky_relu: lambda d: (*_x(d), *d.pick((), (0.2,), (-0.2,))),
    F.sigmoid: _x,
    F.tanh: _x,
    F.gelu: _x,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    F.log_softmax: _softmax,
    torch.log_softmax: _softmax,
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.mse_loss: _mse,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.dropout: lambda d: (*_x(d), d.pick(0.0, 0.1, 0.5), d.pick(True, True, False)),
    torch.add: _broadcast,
    torch.sub: _broadcast,
    Tensor.__rsub__: lambda d: (*_x(d), d.pick(1.0, 2.5)),
    torch.mul: _broadcast,
    torch.div: lambda d: _broadcast(d, partial(_signed, d)),
    Tensor.__rtruediv__: lambda d: (_signed(d, *d.shape()), d.pick(1.0, 2.5)),
    torch.neg: _x,
    torch.pow: lambda d: d.pick((*_x(d), d.pick(1, 2, 3)),
                                (d.positive(*d.shape()), d.pick(-0.7, 0.5, -2, 1.5))),
    torch.exp: _x,
    torch.log: lambda d: (d.positive(*d.shape()),),
    torch.reshape: _reshape,
    torch.flatten: lambda d: (d.x(*d.shape(2, 3)), d.pick(0, 1)),
    torch.squeeze: _squeeze,
    torch.unsqueeze: lambda d: (*_x(d), d.pick(0, -1)),
    torch.permute: _permute,
    torch.transpose: lambda d: (d.x(*d.shape(2, 3)), 0, d.pick(1, -1)),
    Tensor.T.__get__: lambda d: (d.x(*d.shape(2)),),  # type: ignore[attr-defined]
    Tensor.mT.__get__: lambda d: (d.x(*d.shape(2, 3)),),  # type: ignore[attr-defined]
    torch.clone: _x,
    Tensor.contiguous: _x,
    Tensor.to: lambda d: (*_x(d), d.pick(torch.float64, torch.float32)),
    Tensor.float: _x,
    Tensor.double: _x,
    Tensor.bfloat16: _x,
    Tensor.half: lambda d: (d.unit(*d.shape()),),
    torch.sum: _reduction,
    torch.mean: _reduction,
}  # fmt: skip


def _rule(d: Draw) -> Call:
    function = d.pick(*ARGUMENTS)
    args = ARGUMENTS[function](d)
    rule = rules.TABLE[function]
    target: Any = as_function(rule)
    tensors = [n for n, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    if len(tensors) > 1 and d.chance(0.1):
        place = d.pick(*tensors)
        args = tuple(Constant(a) if n == place else a for n, a in enumerate(args))
    if any(isinstance(a, Constant) for a in args):
        target, args = _holding(target.apply, args)
    return Call("", rule.name, target, args, second_order=d.chance(0.25))


# --- Plain torch --------------------------------------------------------------------------------


def _plain(function: Callable, *args: Any, **kwargs: Any) -> Call:
    """The call of a torch function, through a callable that checks nothing else."""

    held, args = _holding(function, args)

    def call(*args, **kwargs):
        return held(*args, **kwargs)

    call.__name__ = getattr(function, "__name__", str(function))
    return Call("", call.__name__, call, args, kwargs)


def _same(d: Draw, count: int, *ranks: int) -> tuple[Tensor, ...]:
    shape = d.shape(*ranks)
    return tuple(d.x(*shape) for _ in range(count))


def _axis(d: Draw, function: Callable, **kwargs: Any) -> Call:
    x = d.x(*d.shape(1, 2, 3))
    return _plain(function, x, d.random.randrange(x.dim()), **kwargs)


def _loss(d: Draw, function: Callable, **kwargs: Any) -> Call:
    return _plain(function, *_same(d, 2), reduction=d.pick("mean", "sum", "none"), **kwargs)


def _attention(d: Draw) -> Call:
    lead = (d.size(1, 2), d.size(1, 2, 3))
    t, s, e, v = d.size(), d.size(), d.size(), d.size()
    causal = d.chance(0.3)
    s = t if causal else s
    return _plain(
        F.scaled_dot_product_attention, d.x(*lead, t, e), d.x(*lead, s, e), d.x(*lead, s, v),
        is_causal=causal,
    )  # fmt: skip


def _gather(d: Draw) -> Call:
    n, m = d.size(), d.size()
    return _plain(torch.gather, d.x(n, m), 1, d.index(m, n, d.size()))


def _index_add(d: Draw) -> Call:
    n, m, k = d.size(), d.size(), d.size()
    return _plain(torch.index_add, d.x(n, m), 0, d.index(n, k), d.x(k, m))


def _embedding(d: Draw) -> Call:
    n = d.size(2, 3, 5, 11)
    return _plain(
        F.embedding, d.index(n, *d.shape(1, 2)), d.x(n, d.size()), padding_idx=d.pick(None, 0)
    )


def _pooled(d: Draw) -> Call:
    dims = d.pick(1, 2, 3)
    if d.chance(0.5):
        functions: tuple[Any, ...] = (
            F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
            F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
        )  # fmt: skip
        shape = [d.size(1, 2, 3), d.size(1, 2), *(d.size() for _ in range(dims))]
        function = functions[dims - 1 + 3 * d.pick(0, 1)]
        return _plain(function, d.x(*shape), [d.size(1, 2, 3) for _ in range(dims)])
    x, kernel, stride, padding = _pool(d, dims)
    functions = (F.max_pool1d, F.max_pool2d, F.max_pool3d,
                 F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)  # fmt: skip
    return _plain(functions[dims - 1 + 3 * d.pick(0, 1)], x, kernel, stride, padding)


def _convolved(d: Draw) -> Call:
    dims = d.pick(1, 2, 2, 3)
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return _plain(function, *_conv(d, dims))


def _interpolate(d: Draw) -> Call:
    mode = d.pick("nearest", "bilinear", "bicubic", "area")
    more = {} if mode in ("nearest", "area") else {"align_corners": d.pick(False, True)}
    x = d.x(d.size(1, 2), d.size(1, 2, 3), d.size(2, 3, 5), d.size(2, 3, 5))
    return _plain(F.interpolate, x, (d.size(1, 2, 5, 7), d.size(2, 3, 6)), mode=mode, **more)


def _einsum(d: Draw) -> Call:
    n, i, j, k = (d.size() for _ in range(4))
    return d.pick(
        lambda: _plain(partial(torch.einsum, "ni,ij->nj"), d.x(n, i), d.x(i, j)),
        lambda: _plain(partial(torch.einsum, "nij,njk,nk->ni"), d.x(n, i, j), d.x(n, j, k),
                       d.x(n, k)),
        lambda: _plain(partial(torch.einsum, "ii->i"), d.x(i, i)),
    )()  # fmt: skip


def _cosine(d: Draw) -> Call:
    shape = d.shape(1, 2)
    # Away from norms of 1e-8 and less, where torch's own gradient of it is wrong: the norm is
    # clamped to eps out of sight of autograd.
    x, y = (_signed(d, *shape) for _ in range(2))
    return _plain(F.cosine_similarity, *(1e-3 * v / v.abs().min() for v in (x, y)), dim=-1)


# Without two that torch has wrong: hardsigmoid's derivative is 1/6 as float32 has it, in float64
# too; asinh's, 1/√(x² + 1), is 0 in float16 where x² overflows.
ELEMENTWISE: tuple[Callable, ...] = (
    F.relu, F.relu6, F.elu, F.selu, F.celu, F.silu, F.mish, F.gelu, F.softplus, F.logsigmoid,
    F.hardtanh, F.hardswish, F.softshrink, F.tanhshrink, F.softsign, F.leaky_relu,
    torch.abs, torch.sin, torch.cos, torch.exp, torch.expm1, torch.tanh, torch.sigmoid, torch.atan,
    torch.square, torch.erf, torch.sinh, torch.cosh,
)  # fmt: skip
POSITIVE: tuple[Callable, ...] = (
    torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p, torch.lgamma, torch.log2,
)  # fmt: skip
TORCH: tuple[Callable[[Draw], Call], ...] = (
    *[lambda d, f=f: _plain(f, *_x(d)) for f in ELEMENTWISE],
    *[lambda d, f=f: _plain(f, d.positive(*d.shape())) for f in POSITIVE],
    *[lambda d, f=f: _plain(f, *ARGUMENTS[f](d)) for f in ARGUMENTS if f is not F.nll_loss] * 2,
    # torch's own backward of it refuses pixels whose memory is not contiguous
    *[lambda d: _plain(F.nll_loss, *_nll(d, pixels=False))] * 2,
    *[_convolved] * 8,
    *[_pooled] * 6,
    *[_attention] * 4,
    *[_embedding] * 2,
    *[_einsum] * 2,
    *[lambda d, f=f: _axis(d, f) for f in (
        torch.cumsum, torch.logsumexp, torch.amax, torch.amin, torch.prod, torch.cumprod,
        torch.sort, torch.median, torch.unbind, torch.softmax)],
    *[lambda d, f=f: _loss(d, f) for f in (
        F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.mse_loss)] * 2,
    *[lambda d, f=f: _plain(f, *_same(d, 2)) for f in (
        torch.maximum, torch.minimum, torch.fmax, torch.atan2, torch.hypot)],
    _gather,
    _index_add,
    _interpolate,
    _cosine,
    lambda d: _plain(torch.where, d.index(2, 3, 5).bool(), d.x(3, 5), d.x(3, 5)),
    lambda d: _plain(torch.clamp, d.x(*d.shape()), -1, 1),
    lambda d: _plain(torch.clamp, d.unit(*d.shape()), d.unit(), None),
    lambda d: _plain(F.binary_cross_entropy_with_logits, d.x(3, 5), d.share(3, 5)),
    lambda d: _plain(F.binary_cross_entropy, d.share(3, 5), d.share(3, 5)),
    lambda d: _plain(F.kl_div, d.x(3, 5), d.share(3, 5), reduction=d.pick("batchmean", "sum")),
    # of variances above 1e-6, to which torch clamps them out of sight of autograd
    lambda d: _plain(F.gaussian_nll_loss, d.x(3, 5), d.x(3, 5), d.unit(3, 5).abs() + 0.1),
    lambda d: _plain(
        F.soft_margin_loss, d.x(3, 5), Constant((2 * d.index(2, 3, 5) - 1).to(d.dtype))
    ),
    lambda d: _plain(F.poisson_nll_loss, d.small(3, 5), d.positive(3, 5)),
    lambda d: _plain(F.triplet_margin_loss, d.x(3, 5), d.x(3, 5), d.x(3, 5)),
    lambda d: _plain(F.normalize, _signed(d, *d.shape(2)), dim=-1),
    lambda d: _plain(torch.linalg.vector_norm, _signed(d, *d.shape(1, 2))),
    lambda d: _plain(torch.var, d.x(*d.shape(1), 3), -1),
    lambda d: _plain(torch.std, _signed(d, d.size(), 5), -1),
    lambda d: _plain(F.pad, d.x(2, 3, 5), (1, 2), mode=d.pick("constant", "reflect", "replicate",
                                                             "circular")),
    lambda d: _plain(F.unfold, d.x(d.size(), d.size(1, 2), 5, 6), (2, 3), d.pick(1, 2), 1),
    lambda d: _plain(F.fold, d.x(d.size(), 2 * 6, 4 * 4), (5, 6), (2, 3)),
    lambda d: _plain(F.glu, d.x(d.size(), 6), -1),
    lambda d: _plain(F.prelu, d.x(2, 3, d.size()), d.x(d.pick(1, 3))),
    lambda d: _plain(F.bilinear, d.x(3, 2), d.x(3, 5), d.x(4, 2, 5), d.x(4)),
    lambda d: _plain(F.pixel_shuffle, d.x(d.size(), 4, 2, 3), 2),
    lambda d: _plain(F.local_response_norm, d.unit(2, 5, 3), 3),
    lambda d: _plain(F.group_norm, d.x(d.size(), 4, 3), 2, d.x(4), d.x(4)),
    lambda d: _plain(F.instance_norm, d.x(d.size(), 3, 5), weight=d.x(3), bias=d.x(3)),
    lambda d: _plain(F.rms_norm, d.x(*d.shape(1, 2), 5), (5,), d.x(5)),
    lambda d: _plain(torch.cat, [d.x(2, 3), d.x(d.size(), 3)]),
    lambda d: _plain(torch.stack, [d.x(2, 3), d.x(2, 3)], 1),
    lambda d: _plain(torch.chunk, d.x(d.size(), 3), 2),
    lambda d: _plain(torch.addmm, d.x(3, 4), d.x(3, d_ := d.size()), d.x(d_, 4)),
    lambda d: _plain(torch.cdist, d.x(3, 4), d.x(2, 4)),
    lambda d: _plain(torch.topk, d.x(d.size(), 5), d.pick(1, 2, 3)),
    lambda d: _plain(torch.outer, d.x(d.size()), d.x(d.size())),
    lambda d: _plain(torch.tril, d.x(3, d.size())),
    lambda d: _plain(torch.roll, d.x(3, d.size()), d.pick(1, -1), 1),
)  # fmt: skip


def _torch(d: Draw) -> Call:
    return d.pick(*TORCH)(d)


# --- Modules ------------------------------------------------------------------------------------


def _module(d: Draw) -> Call:
    with torch.random.fork_rng():
        torch.manual_seed(d.random.randrange(10**6))
        module, args, kwargs = d.pick(*MODULES)(d)
    module = module.to(d.dtype)
    scale = d.scale() if d.chance(0.5) else 1.0
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    module.train(d.chance(0.7))
    if d.chance(0.1):
        for number, parameter in enumerate(module.parameters()):
            parameter.requires_grad_(number % 2 == 0)
    return Call("", type(module).__name__, module, args, kwargs)


Made = tuple[nn.Module, tuple, dict[str, Any]]


def _linear_module(d: Draw) -> Made:
    i, o = d.size(), d.size()
    return nn.Linear(i, o, bias=d.chance(0.7)), (d.x(*d.shape(0, 1, 2), i),), {}


def _conv_module(d: Draw) -> Made:
    dims = d.pick(1, 2, 2, 3)
    x, weight, bias, stride, padding, dilation, groups = _conv(d, dims)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    fits = all(p < size for p, size in zip(padding, x.shape[-dims:], strict=True))
    mode: Any = d.pick("circular", "replicate") if fits and d.chance(0.4) else "zeros"
    module = kind(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(stride),
        tuple(padding), tuple(dilation), groups, bias is not None,
        mode,
    )  # fmt: skip
    return module, (x,), {}


def _transposed(d: Draw) -> Made:
    c, o, groups, stride = d.size(1, 2, 3), d.size(1, 2), d.pick(1, 2), d.size(1, 2, 3)
    module = nn.ConvTranspose2d(
        c * groups, o * groups, d.size(2, 3), stride, d.size(0, 1), d.size(0, stride - 1), groups,
        d.chance(0.7),
    )  # fmt: skip
    return module, (d.x(d.size(1, 2), c * groups, d.size(2, 3, 4), d.size(2, 3)),), {}


def _batch_norm_module(d: Draw) -> Made:
    c = d.size(1, 2, 3, 5)
    kind, more = d.pick((nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (2, 3)))
    module = kind(c, affine=d.chance(0.8), track_running_stats=d.chance(0.8), eps=d.pick(1e-5, 0.1))
    return module, (d.x(d.size(2, 3, 5), c, *more),), {}


def _norm_module(d: Draw) -> Made:
    c, t, n = d.size(2, 4, 6), d.size(2, 3, 5), d.size(1, 2, 3)
    return d.pick(
        lambda: (nn.LayerNorm(t, elementwise_affine=d.chance(0.7)), (d.x(n, c, t),), {}),
        lambda: (nn.LayerNorm((c, t)), (d.x(n, c, t),), {}),
        lambda: (nn.GroupNorm(2, c, affine=d.chance(0.7)), (d.x(n, c, t),), {}),
        lambda: (nn.InstanceNorm1d(c, affine=d.chance(0.7)), (d.x(n, c, t),), {}),
        lambda: (nn.RMSNorm(t), (d.x(n, c, t),), {}),
    )()


def _recurrent(d: Draw) -> Made:
    i, h, t, n = d.size(1, 2, 3), d.size(1, 2, 3), d.size(1, 2, 4), d.size(1, 2, 3)
    kind = d.pick(nn.RNN, nn.LSTM, nn.GRU)
    module = kind(
        i, h, d.pick(1, 1, 2), bias=d.chance(0.8), batch_first=d.chance(0.5),
        bidirectional=d.chance(0.4),
    )  # fmt: skip
    x = d.x(n, t, i) if module.batch_first else d.x(t, n, i)
    if d.chance(0.5):
        return module, (x,), {}
    states = module.num_layers * (2 if module.bidirectional else 1)
    h0 = d.unit(states, n, h)
    return module, (x, (h0, d.unit(states, n, h)) if kind is nn.LSTM else h0), {}


def _cell(d: Draw) -> Made:
    i, h, n = d.size(), d.size(), d.size()
    return d.pick(nn.RNNCell, nn.LSTMCell, nn.GRUCell)(i, h), (d.x(n, i),), {}


def _attention_module(d: Draw) -> Made:
    heads, each = d.size(1, 2, 3), d.size(1, 2, 3)
    e, t, s, n = heads * each, d.size(1, 2, 4), d.size(1, 3), d.size(1, 2)
    module = nn.MultiheadAttention(e, heads, bias=d.chance(0.7), batch_first=d.chance(0.5))
    first = (lambda n, t: (n, t)) if module.batch_first else (lambda n, t: (t, n))
    query = d.x(*first(n, t), e)
    if d.chance(0.5):
        return module, (query, query, query), {"need_weights": d.chance(0.5)}
    return module, (query, d.x(*first(n, s), e), d.x(*first(n, s), e)), {}


def _embedding_module(d: Draw) -> Made:
    n = d.size(2, 3, 5, 11)
    if d.chance(0.3):
        return nn.EmbeddingBag(n, d.size(), mode=d.pick("sum", "mean", "max")), (
            d.index(n, 3, 4),), {}  # fmt: skip
    return nn.Embedding(n, d.size(), padding_idx=d.pick(None, 0)), (d.index(n, *d.shape(1, 2)),), {}


def _other_module(d: Draw) -> Made:
    n, c, t = d.size(), d.size(2, 3), d.size(2, 3, 5)
    return d.pick(
        lambda: (nn.PReLU(d.pick(1, c)), (d.x(n, c, t),), {}),
        lambda: (nn.Dropout(d.pick(0.1, 0.5)), (d.x(n, c, t),), {}),
        lambda: (nn.Dropout2d(0.5), (d.x(n, c, t, 2),), {}),
        lambda: (nn.Bilinear(c, t, 2), (d.x(n, c), d.x(n, t)), {}),
        lambda: (nn.MaxPool2d(2, ceil_mode=True), (d.x(n, c, t, 3),), {}),
        lambda: (nn.AvgPool2d(2, padding=1), (d.x(n, c, t, 3),), {}),
        lambda: (nn.AdaptiveAvgPool2d((2, 1)), (d.x(n, c, t, 3),), {}),
        lambda: (nn.Softmax(-1), (d.x(n, c, t),), {}),
        lambda: (nn.TransformerEncoderLayer(4, 2, 3, 0.1, batch_first=True),
                 (d.unit(2, 3, 4),), {}),
    )()  # fmt: skip


MODULES: tuple[Callable[[Draw], Made], ...] = (
    *[_linear_module] * 3, *[_conv_module] * 4, *[_transposed] * 2, *[_batch_norm_module] * 3,
    *[_norm_module] * 3, *[_recurrent] * 4, _cell, *[_attention_module] * 2,
    *[_embedding_module] * 2, *[_other_module] * 3,
)  # fmt: skip


class Masking(Function):
    """Multiplies by a mask, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *grad_z: Tensor) -> tuple:
        return grad_z[0] * ctx.saved_tensors[0], None


class ByRules(nn.Module):
    """A small convolutional network all of whose layers are rules as Functions."""

    def __init__(self, channels: int, hidden: int, classes: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, 1, 3, 3))
        self.gamma = nn.Parameter(torch.randn(hidden))
        self.inner = nn.Linear(channels * 4, hidden)
        self.outer = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        conv, relu, pool, linear, norm, tanh = (
            as_function(rules.TABLE[f]).apply
            for f in (F.conv2d, F.relu, F.max_pool2d, F.linear, F.layer_norm, F.tanh)
        )
        a = pool(relu(conv(x, self.kernel, None, 1, 0)), 2)
        z = linear(a.flatten(1), self.inner.weight, self.inner.bias)
        a = tanh(norm(z, [z.shape[1]], self.gamma))
        return linear(a, self.outer.weight, self.outer.bias)


class Masked(nn.Module):
    """A layer whose output is masked by a Function."""

    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(36, hidden)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x.flatten(1))
        return Masking.apply(z, 2.0 * (torch.arange(z.shape[1]) % 2).to(z))


def _network(d: Draw) -> Call:
    c, h, k, n = d.size(1, 2, 3), d.size(2, 3, 5), d.size(1, 2, 5), d.size(1, 2, 3)
    with torch.random.fork_rng():
        torch.manual_seed(d.random.randrange(10**6))
        network = d.pick(
            lambda: ByRules(c, h, k),
            lambda: Masked(h),
            lambda: nn.Sequential(
                nn.Conv2d(1, c, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(4 * c, h), nn.BatchNorm1d(h), nn.Sigmoid(), nn.Linear(h, k),
            ) if n > 1 else nn.Sequential(
                nn.Flatten(), nn.Linear(36, h), nn.GELU(), nn.Linear(h, k)
            ),
        )()  # fmt: skip
    return Call("", "network", network.to(d.dtype), (d.x(n, 1, 6, 6),))


# --- Pairs of NumPy functions -------------------------------------------------------------------


def np_affine(x, weight, bias):
    return x @ weight.T + bias


def np_affine_backward(grad, x, weight, bias):
    return grad @ weight, grad.T @ x, grad.sum(0)


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_softmax_backward(grad, x):
    y = np_softmax(x)
    return (y * (grad - (grad * y).sum(-1, keepdims=True)),)


def np_relu(x):
    return np.maximum(x, 0)


def np_relu_backward(grad, x):
    return (grad * (x > 0),)


def np_squared_error(x, y):
    return np.mean((x - y) ** 2)


def np_squared_error_backward(grad, x, y):
    slope = 2 * (x - y) / x.size * grad
    return slope, -slope


def np_layer_norm(x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)


def np_layer_norm_backward(grad, x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)
    x_hat = centred / deviation
    grad_hat = grad * gamma
    means = grad_hat.mean(-1, keepdims=True) + x_hat * (grad_hat * x_hat).mean(-1, keepdims=True)
    return (grad_hat - means) / deviation, (grad * x_hat).sum(tuple(range(grad.ndim - 1)))


def np_cumulative(x):
    return np.cumsum(x, -1)


def np_cumulative_backward(grad, x):
    return (np.flip(np.cumsum(np.flip(grad, -1), -1), -1),)


def np_tanh_backward(grad, x):
    return (grad * (1 - np.tanh(x) ** 2),)


def _numpy(d: Draw) -> Call:
    if d.dtype in (torch.bfloat16, torch.float16):
        d.dtype = torch.float64
    n, i, o = d.size(), d.size(), d.size()
    pair, args = d.pick(
        lambda: ((np_affine, np_affine_backward), (d.x(n, i), d.x(o, i), d.x(o))),
        lambda: ((np_softmax, np_softmax_backward), (d.x(n, i),)),
        lambda: ((np_relu, np_relu_backward), (d.x(n, i),)),
        lambda: ((np_squared_error, np_squared_error_backward), (d.x(n, i), d.x(n, i))),
        lambda: ((np_layer_norm, np_layer_norm_backward), (d.x(n, 5), d.x(5))),
        lambda: ((np_cumulative, np_cumulative_backward), (d.x(n, i),)),
        lambda: ((np.tanh, np_tanh_backward), (d.x(n, i),)),
    )()
    return Call("", pair[0].__name__, pair, tuple(a.numpy() for a in args))


# --- The catalogue's equivalents ----------------------------------------------------------------


def _equivalent(d: Draw) -> Call:
    """Its own data, since some are about a kink there; in other types, layouts and scales."""
    chosen = d.pick(*catalogue.EQUIVALENTS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, inputs = chosen.make()
    if d.dtype in (torch.bfloat16, torch.float16):
        d.dtype = torch.float32
    scale = 2.0 ** d.random.randint(-10, 10) if chosen.family in ("linear", "pooling") else 1.0
    moved = tuple(
        _relaid(d, x * scale) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )
    return Call("", chosen.name, target, moved)


def _relaid(d: Draw, x: Tensor) -> Tensor:
    """In one of the layouts that keep every value."""
    x = x.to(d.dtype)
    how = d.pick("plain", "transposed", "every second")
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every second" and x.dim():
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x


KINDS_OF_CALL: dict[str, Callable[[Draw], Call]] = {
    "rule": _rule,
    "torch": _torch,
    "module": _module,
    "numpy": _numpy,
    "equivalent": _equivalent,
    "network": _network,
}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
