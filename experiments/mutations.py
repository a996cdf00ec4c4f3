"""Does the gradient checker find what is wrong, name it, and leave right gradients alone?

    python experiments/mutations.py --workers 2    # the catalogue and 10,000 right gradients
    python experiments/mutations.py --smoke        # a few of each, a minute

What is compared, and what came out: results/mutations/README.md. The mistakes and the right
gradients are in mutants/. Configuration i is drawn from the seed i alone.
"""

import collections
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from mutants import EQUIVALENTS, MUTANTS
from mutants.checked import Job, checked
from nn_backprop import figures, studies
from nn_backprop.studies import Claim, Row, Rows, Table
from nn_backprop.studies.jobs import results

# The mistakes by what their names are evidence of, with the words for them in tables.
PARTS = {
    "unseen": "of the mistakes unseen",
    "read": "of the half that was held out until its misses were read",
    "fit": "of the half the hypotheses were written with",
}
# The words for how a mistake was named, which are the parts of a whole.
NAMES = ("first cause right", "second or third right", "unknown", "wrong", "not caught")
CHECKERS = {"ours": "verdict", "gradcheck": "gradcheck", "gradcheck, fast mode": "fast"}

# What this project promises: shares of all mistakes, of the unseen ones, of right gradients.
CAUGHT, NAMED, NAMED_AMONG_THREE, CALLED_RIGHT = 1.0, 0.80, 0.95, 1.0


@dataclass(frozen=True, kw_only=True)
class Options(studies.Command):
    """Wrong gradients caught and named; right gradients left alone."""

    least: ClassVar[dict[str, int]] = {"configurations": 0, "workers": 1}

    configurations: int = 10_000
    """Number of random configurations that are right; 40 of a smoke run."""
    first: int = 0
    """The number of the first of them."""
    catalogue: bool = True
    """Whether the mistakes are gone through as well; every tenth of a smoke run."""
    workers: int = 1
    """Processes, of one thread each."""


def collect(run: studies.StudyRun, options: Options) -> None:
    if options.catalogue:
        jobs: list[Job] = [("mistake", n) for n in range(len(MUTANTS))]
        jobs += [("equivalent", n) for n in range(len(EQUIVALENTS))]
        run.train_all(checked, jobs[:: 10 if options.smoke else 1])
    count = 40 if options.smoke else options.configurations
    drawn = [("configuration", n) for n in range(options.first, options.first + count)]
    right: dict[int, Row] = {}
    for number, row in tqdm(results(checked, drawn, options.workers), total=count):
        right[number] = row
        if "report" in row:
            text = f"configuration {row['number']}: {row['description']}\n{row.pop('report')}\n"
            tqdm.write(text)
            append(run.opened.path / "alarms.txt", text)
        append(run.opened.path / "configurations.jsonl", json.dumps(row))
    run.add(by_kind([right[number] for number in range(count)]))


def append(file: Path, line: str) -> None:
    """As each comes, so that a study that ends early has lost none."""
    with file.open("a", encoding="utf-8") as kept:
        kept.write(f"{line}\n")


# --- What the rows come to ----------------------------------------------------------------------


def by_kind(right: Sequence[Row]) -> list[Row]:
    """Right gradients, counted by what they are of, by precision, and all of them."""
    rows = Rows(right)
    groups = rows.by("kind")
    groups |= {f"in {precision}": part for precision, part in rows.by("precision").items()}
    counted = []
    for name, part in (groups | {"all": rows} if rows else {}).items():
        verdicts = collections.Counter(row["verdict"] for row in part)
        unsure = [row["reason"] for row in part if row["verdict"] == "inconclusive"]
        counted.append({
            "of": "right gradients", "configurations": name, "number": len(part),
            **{verdict: verdicts[verdict] for verdict in ("pass", "fail", "inconclusive")},
            "reasons": dict(collections.Counter(unsure).most_common()),
            "probes": sum(row["probes"]["pass"] + row["probes"]["fail"] for row in part),
            "mean_seconds": statistics.fmean(row["seconds"] for row in part),
        })  # fmt: skip
    return counted


def is_caught(outcome: str) -> bool:
    return outcome in ("fail", "caught")


def naming(row: Row) -> str:
    """How a mistake was named: one of `NAMES`."""
    if not is_caught(row["verdict"]):
        return "not caught"
    if row["place"]:
        return "first cause right" if row["place"] == 1 else "second or third right"
    return "unknown" if row["causes"][:1] in ([], ["unknown"]) else "wrong"


def by_family(rows: Rows) -> dict[str, Rows]:
    return Rows({**row, "family": row["name"].partition("/")[0]} for row in rows).by("family")


def exact_interval(count: int, total: int) -> tuple[float, float]:
    """Clopper and Pearson's (1934) 95 % interval of a share."""
    from scipy.stats import beta

    tail = (1 - 0.95) / 2
    low = float(beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return low, high


def claims(rows: Rows) -> list[Claim]:
    """What the project promises."""
    mistakes, equivalents = rows.where(of="mistake"), rows.where(of="equivalent")
    unseen = mistakes.where(part="unseen")
    first, among_three, *_ = name_counts(unseen).values()
    drawn = rows.where(configurations="all")
    right = len(equivalents) + sum(row["number"] for row in drawn)
    alarms = sum(is_caught(row["verdict"]) for row in equivalents) + sum(r["fail"] for r in drawn)
    caught = sum(is_caught(row["verdict"]) for row in mistakes)
    counts = [
        ("mistakes caught", CAUGHT, caught, len(mistakes)),
        ("mistakes unseen: first cause right", NAMED, first, len(unseen)),
        ("mistakes unseen: one of three right", NAMED_AMONG_THREE, among_three, len(unseen)),
        ("right gradients called right", CALLED_RIGHT, right - alarms, right),
    ]
    return [
        studies.judged(
            f"{claim}: {100 * promised:g} % or more (this project's promise)",
            promised, count / total, exact_interval(count, total), low=promised,
        )
        for claim, promised, count, total in counts
        if total
    ]  # fmt: skip


def tables(rows: Rows) -> dict[str, Table]:
    mistakes, equivalents = rows.where(of="mistake"), rows.where(of="equivalent")
    right = rows.where(of="right gradients")
    found: dict[str, Table] = {
        "Caught and named": summary(rows) if mistakes else [],
        "By family": [family_line(*of) for of in by_family(mistakes).items()],
        "Right gradients": right_lines(right),
        "Every mistake": [line(row) for row in mistakes],
        "Every equivalent": [line(row) for row in equivalents],
    }
    return {title: table for title, table in found.items() if table}


def summary(rows: Rows) -> list[dict[str, str]]:
    """A line a measure, a column a checker; gradcheck names nothing."""
    mistakes, hidden = rows.where(of="mistake"), rows.having("hidden_verdict")
    equivalents, right = rows.where(of="equivalent"), rows.where(configurations="all")
    lines: dict[str, list[str]] = {}

    def caught(words: str, of: Rows, prefix: str = "") -> None:
        lines[f"{words} ({len(of)})"] = [
            share(sum(is_caught(row[prefix + key]) for row in of), len(of))
            for key in CHECKERS.values()
        ]

    caught("mistakes caught", mistakes)
    lines[f"not run, or no verdict ({len(mistakes)})"] = [
        str(sum(row[key] in ("not run", "inconclusive") for row in mistakes))
        for key in CHECKERS.values()
    ]
    for key, words in PARTS.items():
        part = mistakes.where(part=key)
        for what, count in name_counts(part).items() if part else ():
            cells = [share(count, len(part)), "none", "none"]
            lines[f"{words}: {what} ({len(part)})"] = cells
    if hidden:
        caught("mistakes found on data where the gradient comes out right", hidden, "hidden_")
    if equivalents:
        caught("right but unusual gradients called wrong", equivalents)
    for row in right:
        words = f"right gradients drawn at random called wrong ({row['number']})"
        lines[words] = [share(row["fail"], row["number"]), "–", "–"]
    timed = rows.where(of="mistake") + rows.where(of="medians")
    lines["seconds a mistake, median"] = [
        f"{statistics.median(row[key] for row in timed if key in row):.3f}"
        for key in ("seconds", "gradcheck_seconds", "fast_seconds")
    ]
    return [{"": words, **dict(zip(CHECKERS, cells, strict=True))}
            for words, cells in lines.items()]  # fmt: skip


def name_counts(part: Rows) -> dict[str, int]:
    names = collections.Counter(naming(row) for row in part)
    first, later = names["first cause right"], names["second or third right"]
    causes = [row["causes"][0] for row in part if row["causes"] and row["place"] != 1]
    return {
        "the first cause is right": first,
        "one of the first three is": first + later,
        "first cause `unknown`, none right": names["unknown"],
        "first cause wrong and not `unknown`": sum(cause != "unknown" for cause in causes),
    }


def family_line(name: str, members: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {"family": name, "mistakes": len(members)}
    for checker, key in CHECKERS.items():
        found[f"caught by {checker}"] = sum(is_caught(row[key]) for row in members)
    for part in PARTS:
        places = [row["place"] for row in members.where(part=part)]
        found[f"{part}: first right"] = f"{places.count(1)} of {len(places)}"
        found[f"{part}: of three"] = f"{len(places) - places.count(None)} of {len(places)}"
    return found | {"median s": f"{statistics.median(row['seconds'] for row in members):.3f}"}


def right_lines(right: Rows) -> list[dict[str, Any]]:
    reasons: dict[str, int] = {}
    for row in right.where(configurations="all"):
        reasons = row["reasons"]
    return [
        {
            "configurations": row["configurations"],
            "number": row["number"],
            "pass": row["pass"],
            "fail": row["fail"],
            "fail, %": share(row["fail"], row["number"]),
            "inconclusive": row["inconclusive"],
            **{f"… {reason}": row["reasons"].get(reason, 0) for reason in reasons},
            "probes run": row["probes"],
            "mean s": f"{row['mean_seconds']:.3f}",
        }
        for row in right
    ]


def line(row: Row) -> dict[str, str]:
    """A mistake or an equivalent."""
    mistake = row["of"] == "mistake"
    places = {1: "first", 2: "second", 3: "third", None: "no"}
    return {
        "name": row["name"].replace("|", "\\|"),
        "part": row["part"] if mistake else "–",
        "right names": ", ".join(row["right_kinds"]) or "–",
        "verdict": row["verdict"],
        "first cause": row["causes"][0] if row["causes"] else "–",
        "right?": places[row["place"]] if mistake else "–",
        "gradcheck": row["gradcheck"],
        "fast mode": row["fast"],
        "where it hides": row.get("hidden_verdict", "–"),
        "s": f"{row['seconds']:.3f}",
    }


def share(count: int, total: int) -> str:
    low, high = (100 * bound for bound in exact_interval(count, total))
    digits = 1 if total < 1000 else 3
    return f"{count}: {100 * count / total:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]"


def picture(rows: Rows) -> figures.Figure | None:
    mistakes = rows.where(of="mistake")
    titles = {f"{name} ({len(of)})": of for name, of in by_family(mistakes).items()}
    if not mistakes:
        return None

    def named(parts: Iterable[str]) -> dict[str, collections.Counter[str]]:
        return {
            title: collections.Counter(naming(row) for row in members if row["part"] in parts)
            for title, members in titles.items()
        }

    caught = {
        title: {
            checker: sum(is_caught(row[key]) for row in members) / len(members)
            for checker, key in CHECKERS.items()
        }
        for title, members in titles.items()
    }
    return figures.rates_by_group(
        caught, {"names, unseen": named(["unseen"]), "names, the others": named(["read", "fit"])},
        NAMES, f"{len(mistakes)} wrong gradients: caught, and named by our checker",
    )  # fmt: skip


STUDY = studies.Study(Options, collect, claims, tables, picture)

if __name__ == "__main__":
    sys.exit(STUDY.main())
