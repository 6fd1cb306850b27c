"""`python -m benchmarks`: measures this machine against its own limits, and prints what came out."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import comparison, ingest, many_polls, pipeline, unary, watching
from benchmarks.figures import Effort, Figure, machine
from benchmarks.stage import stage

BENCHMARKS = {
    "ingest": ingest.run,
    "pipeline": pipeline.run,
    "unary": unary.run,
    "many_polls": many_polls.run,
    "growth": ingest.grow,
    "repeats": ingest.repeat,
    "comparison": comparison.run,
    "watching": watching.run,
}
NORMAL = Effort(rounds=5, votes=1_000_000, seconds=2.0, big_poll=2_000_000, watchers=10_000, many_polls=(1_000, 10_000))
QUICK = Effort(rounds=1, votes=20_000, seconds=0.3, big_poll=40_000, watchers=500, many_polls=(20, 200))


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Run these only: {', '.join(BENCHMARKS)}.")] = None,
    quick: Annotated[bool, typer.Option(help="Run everything once and small: only to see that it runs.")] = False,
    full: Annotated[bool, typer.Option(help="Let the big poll have ten million votes.")] = False,
    rounds: Annotated[int, typer.Option(min=0, help="How often each side of a ratio is measured.")] = 0,
    votes: Annotated[int, typer.Option(min=0, max=1_000_000, help="Votes in each round.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON lines.")] = Path("build/bench.jsonl"),
) -> None:
    """Measure, in one run that takes turns between both sides of each ratio, and report medians and spread."""
    unknown = set(only or []) - BENCHMARKS.keys()
    if unknown:
        raise typer.BadParameter(f"no such benchmark: {', '.join(sorted(unknown))}")
    effort = QUICK if quick else NORMAL._replace(big_poll=10_000_000) if full else NORMAL
    effort = effort._replace(rounds=rounds or effort.rounds, votes=votes or effort.votes)
    asyncio.run(_run(only or list(BENCHMARKS), effort, output, bounded=not quick))


async def _run(names: list[str], effort: Effort, output: Path, *, bounded: bool) -> None:
    console = Console()
    if not console.is_terminal:
        # The table's width; a log has none of its own.
        console.width = 150
    output.parent.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    with output.open("w") as lines:
        async with stage() as running:
            description = {**machine(), **await running.durability(), **effort._asdict()}
            console.print(", ".join(f"{key}: {value}" for key, value in description.items() if key != "name"))
            lines.write(json.dumps(description) + "\n")
            for name in names:
                with console.status(f"{name} …"):
                    measured = await BENCHMARKS[name](running, effort)
                for figure in measured if bounded else (replace(each, bound=None) for each in measured):
                    figures.append(figure)
                    lines.write(figure.line() + "\n")
                lines.flush()
    console.print(_table(figures))
    console.print(f"written to {output}")


def _table(figures: list[Figure]) -> Table:
    table = Table("figure", "value", "baseline", "ratio", "from … to", "asked for")
    for figure in figures:
        bound = "" if figure.bound is None else f"{'≤' if figure.at_most else '≥'} {figure.bound:g}"
        table.add_row(
            figure.name,
            f"{_number(figure.value)} {figure.unit}",
            f"{_number(figure.baseline)} ({figure.baseline_name})",
            f"{figure.ratio:.2f}",
            f"{figure.spread[0]:.2f} … {figure.spread[1]:.2f}",
            bound if figure.kept else f"[bold red]{bound}[/]",
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
