"""Lists every objective, or explains one: equation, notes, parameters with defaults, what it needs, its paper.

    mmalign objectives                    the table
    mmalign objectives kto                one of them
    mmalign objectives output=paper_index.md

`output` writes all of them into a Markdown file.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mmalign.core.objectives.catalogue import Entry, entries
from mmalign.data.durable import write_atomically

POSITIONAL = "name"
TABLE_WIDTH = 130


@dataclass(frozen=True, kw_only=True)
class Settings:
    # the objective to explain; null: the table of all
    name: str | None = None
    # a Markdown file to write all of them into
    output: str | None = None


def run(settings: Settings) -> list[Entry]:
    found = list(entries())
    console = Console()
    if settings.name is not None:
        found = [one for one in found if one.name == settings.name]
        if not found:
            names = [one.name for one in entries()]
            nearest = difflib.get_close_matches(settings.name, names, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise ValueError(f"no objective {settings.name!r}; {hint}(expected one of {', '.join(names)})")
    if settings.output is not None:
        write_atomically(Path(settings.output), paper_index(found).encode())
        console.print(f"{len(found)} objectives -> {settings.output}")
    elif settings.name is not None:
        console.print(explain(found[0]), markup=False, highlight=False)
    else:
        # Narrower, the table is a column of syllables.
        Console(width=max(console.width, TABLE_WIDTH)).print(_table(found))
    return found


def explain(one: Entry) -> str:
    """A page on one objective, with a section to paste into a config."""
    section = yaml.safe_dump({"objective": {"name": one.name, **one.parameters}}, sort_keys=False).strip()
    needs = f"{one.feedback}; {'a reference' if one.needs_reference else 'no reference'}"
    if one.looks_at_whole_batch:
        needs += "; looks at the whole batch"
    parts = [f"{one.name} ({one.family}): {one.summary}", _indented(one.equation), one.notes, f"Needs: {needs}."]
    if one.family != "policy_gradient":
        parts.append(_indented(section))
    return "\n\n".join(part for part in [*parts, f"Source: {one.source}"] if part)


def paper_index(found: list[Entry]) -> str:
    """Every objective with its equation and its source, as Markdown."""
    lines = ["# Objectives and their papers", "", "Written by `mmalign objectives output=paper_index.md`.", ""]
    for family in dict.fromkeys(one.family for one in found):
        lines += [f"## {family}", ""]
        for one in found:
            if one.family == family:
                parts = [f"### {one.name}", one.summary, f"```\n{one.equation}\n```", one.notes, one.source]
                lines += [line for part in parts if part for line in (part, "")]
    return "\n".join(lines).rstrip() + "\n"


def _table(found: list[Entry]) -> Table:
    table = Table(title=f"{len(found)} objectives; `mmalign objectives <name>` explains one", title_justify="left")
    for column in ("family", "name", "feedback", "ref.", "parameters", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column in ("family", "name"))
    family = ""
    for one in found:
        parameters = ", ".join(f"{key} {_short(value)}" for key, value in one.parameters.items())
        shown = one.family if one.family != family else ""
        table.add_row(
            shown, one.name, one.feedback, "yes" if one.needs_reference else "no", parameters, _papers(one.source)
        )
        family = one.family
    return table


def _papers(source: str) -> str:
    return ", ".join(re.findall(r"arXiv ([\d.]+)", source)) or source


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
