"""`python -m benchmarks`: measures this machine against its own limits, and prints what came out."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import ingest
from benchmarks.figures import Figure, machine
from benchmarks.stage import stage

BENCHMARKS = {"ingest": ingest.run}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Run these only: {', '.join(BENCHMARKS)}.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side of a ratio is measured.")] = 5,
    votes: Annotated[int, typer.Option(min=20_000, help="Votes in each round.")] = 400_000,
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON lines.")] = Path("build/bench.jsonl"),
) -> None:
    """Measure, in one run that takes turns between both sides of each ratio, and report medians and spread."""
    unknown = set(only or []) - BENCHMARKS.keys()
    if unknown:
        raise typer.BadParameter(f"no such benchmark: {', '.join(sorted(unknown))}")
    asyncio.run(_run(only or list(BENCHMARKS), rounds, votes, output))


async def _run(names: list[str], rounds: int, votes: int, output: Path) -> None:
    console = Console()
    output.parent.mkdir(parents=True, exist_ok=True)
    description = machine()
    console.print(", ".join(f"{key}: {value}" for key, value in description.items() if key != "name"))
    figures: list[Figure] = []
    with output.open("w") as lines:
        lines.write(json.dumps(description) + "\n")
        async with stage() as running:
            for name in names:
                with console.status(f"{name} …"):
                    measured = await BENCHMARKS[name](running, rounds, votes)
                figures += measured
                lines.writelines(figure.line() + "\n" for figure in measured)
                lines.flush()
    console.print(_table(figures))
    console.print(f"written to {output}")


def _table(figures: list[Figure]) -> Table:
    table = Table("figure", "value", "baseline", "ratio", "from … to", "asked for")
    for figure in figures:
        bound = "" if figure.bound is None else f"{'≤' if figure.at_most else '≥'} {figure.bound:g}"
        table.add_row(
            figure.name,
            f"{figure.value:,.0f} {figure.unit}",
            f"{figure.baseline:,.0f} ({figure.baseline_name})",
            f"{figure.ratio:.2f}",
            f"{figure.spread[0]:.2f} … {figure.spread[1]:.2f}",
            bound if figure.kept else f"[bold red]{bound}[/]",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
