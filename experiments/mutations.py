"""Does the gradient checker find what is wrong, name it, and leave right gradients alone?

    python experiments/mutations.py --workers 2    # the catalogue and 10,000 right gradients
    python experiments/mutations.py --smoke        # a few of each, a minute

First, every mistake of `mutants`: what `check_gradients` says of it, held against the kinds of
cause that were written down beforehand as right names, and what `torch.autograd.gradcheck` (which
names nothing) says, in its slow and its fast mode, with its default tolerances and the same data in
float64. Names count on the mistakes unseen: no hypothesis was written with them. Then right
gradients: the equivalents, and random configurations of this project's rules, of torch's functions
and modules and of NumPy pairs, of which none may be called wrong. Configuration i is drawn from the
seed i alone.
"""

import collections
import copy
import json
import multiprocessing
import operator
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call
from tqdm import tqdm

from mutants import EQUIVALENTS, MUTANTS, UNSEEN, Mutant, fit
from mutants.right import configuration
from nn_backprop import figures
from nn_backprop.check import Report, check_gradients
from nn_backprop.studies.evidence import Claim, markdown_table, write_results
from nn_backprop.tracking import default_run_dir, describe_machine

Row = dict[str, Any]

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
    names = ["mutant"] * len(MUTANTS) + ["equivalent"] * len(EQUIVALENTS)
    numbers = [*range(len(MUTANTS)), *range(len(EQUIVALENTS))]
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
        of = MUTANTS if kind == "mutant" else EQUIVALENTS
        return task, {"number": number} | _check_mutant(of[number])


def _check_mutant(mutant: Mutant) -> Row:
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


def _part(mutant: Mutant) -> str:
    if mutant in UNSEEN:
        return "unseen"
    return "fit" if mutant in fit() else "read"


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


def _callable(target: Any) -> Any:
    """What is called: of a Function, its apply."""
    return target.apply if isinstance(target, type) and issubclass(target, Function) else target


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


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
