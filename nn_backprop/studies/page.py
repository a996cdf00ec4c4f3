"""What a study's folder holds: rows.jsonl, claims.json, README.md and picture.png.

README.md is a page for readers: prose by hand around blocks that are made of the rows. A block
stands between two lines of its own, and whatever it holds is replaced:

    <!-- generated: NAME -->
    <!-- end -->

NAME is "tables" (all of them), "claims", "run" (how long it took, and on what), or how the title
of one table begins.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nn_backprop.errors import UsageError
from nn_backprop.studies.evidence import Claim, markdown_table
from nn_backprop.studies.jobs import Row
from nn_backprop.tracking import read_json, write_json
from nn_backprop.tracking.files import replace_file

Table = Sequence[Mapping[str, Any]]
BLOCK = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_rows(folder: Path, rows: Iterable[Row], file: str = "rows.jsonl") -> None:
    """A row a line."""
    replace_file(folder / file, "".join(map(line_of, rows)).encode())


def line_of(row: Row) -> str:
    """A row as a line of rows.jsonl; floats have all digits that they need."""
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n"


def write_claims(folder: Path, claims: Sequence[Claim], about: Mapping[str, Any]) -> None:
    """claims.json: `about`, which is of the run (experiment, config, machine, seconds); claims."""
    whole = {**about, "claims": [asdict(claim) for claim in claims]}
    order = ("experiment", "config", "claims", "machine", "seconds")
    write_json(folder / "claims.json", {key: whole[key] for key in order})


def read_about(folder: Path) -> dict[str, Any]:
    """What claims.json says of the run."""
    about: dict[str, Any] = read_json(folder / "claims.json")
    del about["claims"]
    return about


def blocks(
    tables: Mapping[str, Table], claims: Sequence[Claim], rows: int, about: Mapping[str, Any]
) -> dict[str, str]:
    """The blocks of a page: a table each, by its title, then "claims" and "run"."""
    made = {title: f"**{title}**\n\n{markdown_table(table)}" for title, table in tables.items()}
    if claims:
        made["claims"] = markdown_table([_line(claim) for claim in claims])
    machine, config = about["machine"], about["config"]
    gpu = f"{machine['gpu']} beside " if config.get("device") == "cuda" else ""
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    if workers := config.get("workers"):
        threads = f"{workers} process" + "es" * (workers != 1) + " of one thread"
    made["run"] = (
        f"{rows} rows in {about['seconds'] / 60:.1f} minutes; {gpu}{machine['processor']}, "
        f"{threads}, torch {machine['versions']['torch']}\n"
    )
    return made


def plain_page(blocks: Mapping[str, str]) -> str:
    """All blocks, one after the other, as a run leaves and prints them."""
    return "\n".join(
        ("**Claims**\n\n" * (name == "claims")) + text for name, text in blocks.items()
    )


def renewed(page: str, blocks: Mapping[str, str]) -> str:
    """The page with what its blocks should hold. Raises UsageError if a block is of no such name,
    or a table, the claims or the line of the run stands in none."""
    shown: set[str] = set()

    def renew(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        named = [title for title in blocks if title.startswith(name)]
        if name == "tables":
            named = [title for title in blocks if title not in ("claims", "run")]
        if not named:
            raise UsageError(f"there is no block {name!r}; there are {', '.join(blocks)}")
        shown.update(named)
        return begin + "\n" + "\n".join(blocks[title] for title in named) + "\n" + end

    text = BLOCK.sub(renew, page)
    if missing := [name for name in blocks if name not in shown]:
        raise UsageError(f"the page has no block for {'; '.join(missing)}")
    return text


def _line(claim: Claim) -> dict[str, str]:
    low, high = claim.interval
    return {
        "claim": claim.claim,
        "published": "–" if claim.published is None else f"{claim.published}",
        "measured": f"{claim.measured:.4g}",
        "95 % interval": f"{low:.4g} to {high:.4g}",
        "verdict": f"**{claim.verdict}**",
    }
