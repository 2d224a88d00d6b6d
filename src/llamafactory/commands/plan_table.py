"""The plan as one JSON-able document, and as tables of at most 100 columns."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llamafactory.model.costs import SAMPLING_UTILISATION

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llamafactory.extras.hardware import Hardware
    from llamafactory.hparams.run_config import RunConfig
    from llamafactory.model.plan import ModelPlan
    from llamafactory.model.remedies import WayOut

WIDTH = 100


def plan_document(
    cfg: RunConfig,
    plan: ModelPlan,
    hardware: Hardware,
    ways: Sequence[WayOut],
    *,
    num_devices: int,
    why_assumed: str,
) -> dict[str, Any]:
    """Everything that `plan` says.

    Args:
        cfg: the configuration.
        plan: with costs.
        hardware: what it was made for.
        ways: ways out where the run does not fit.
        num_devices: devices that train together.
        why_assumed: why the rows were not read, or empty.
    """
    return {
        "model": cfg.model.model_name_or_path,
        "stage": cfg.train.stage,
        "finetuning_type": cfg.train.finetuning_type,
        "device": {
            "name": hardware.name,
            "type": hardware.device,
            "memory": hardware.memory_bytes,
            "count": num_devices,
        },
        "plan": plan.to_dict(),
        "rows_assumed_because": why_assumed or None,
        "ways_out": [
            {"changes": dict(way.changes), "total": way.total, "fits": way.fits, "text": way.render()} for way in ways
        ],
    }


def print_plan(document: dict[str, Any]) -> None:
    """Prints the plan for people: with colours and lines on a terminal, plain where the output is piped."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=min(WIDTH, Console().width) if is_terminal else WIDTH, highlight=False)
    with console.capture() as capture:
        _print_parts(console, document)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _print_parts(console: Console, document: dict[str, Any]) -> None:
    plan, device = document["plan"], document["device"]
    costs = plan["costs"]
    count = costs["count"]
    where = device["name"] if device["count"] == 1 else f"{device['count']} x {device['name']}"
    head = f"{document['model']}: {document['stage']}, {document['finetuning_type']}, on {where}"
    console.print(f"[bold]{_plain(head)}[/bold]")
    console.print(_plain(f"rows: {costs['source']}" + _because(document["rows_assumed_because"])))
    for note in costs["notes"]:
        console.print(f"[yellow]{_plain(f'note: {note}')}[/yellow]")
    for title, table in (
        _parameters(count),
        _memory(costs["memory"], costs["room"], per_device=device["count"] > 1),
        _decisions(plan),
        _disk_and_time(costs),
    ):
        console.print(f"\n[bold]{_plain(title)}[/bold]")
        console.print(table)
    console.print()
    if costs["fits"]:
        console.print("[green]The run fits.[/green]")
        return
    total, room = costs["memory"]["total"], costs["room"]
    console.print(f"[red]The run does not fit[/red]: it needs {_gb(total)}, and {_gb(room)} may be used.")
    console.print("Ways out, the cheapest first:")
    for number, way in enumerate(document["ways_out"], start=1):
        console.print(_plain(f"  {number}. {way['text']}"))


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD if sys.stdout.isatty() else None,
        pad_edge=False, padding=(0, 2, 0, 0), header_style="dim",
    )  # fmt: skip
    for index, name in enumerate(columns):
        is_number = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if is_number else "left", no_wrap=index == 0 or is_number)
    return table


def _parameters(count: dict[str, Any]) -> tuple[str, Table]:
    share = count["trained"] / (count["base"] + count["adapter"])
    title = f"Parameters: {count['base']:,} and {count['adapter']:,} of the adapter; {count['trained']:,} trained"
    table = _table("trained in", ">modules", ">parameters")
    for kind in sorted(count["kinds"], key=lambda kind: -kind["num_parameters"]):
        table.add_row(kind["kind"], f"{kind['num_modules']:,}", f"{kind['num_parameters']:,}")
    return f"{title} ({share:.2%})", table


def _memory(memory: dict[str, int], room: int, *, per_device: bool) -> tuple[str, Table]:
    title = f"Memory{' of each device' if per_device else ''}: {_gb(memory['total'])} of {_gb(room)}"
    table = _table("part", ">size", "")
    parts = {name: size for name, size in memory.items() if name != "total" and size}
    for name, size in parts.items():
        table.add_row(name, _gb(size), "#" * math.ceil(40 * size / max(1, memory["total"])))
    return title, table


def _decisions(plan: dict[str, Any]) -> tuple[str, Table]:
    table = _table("decision", "value", "why")
    for name, reason in plan["reasons"].items():
        value = plan[name]
        table.add_row(name, _plain("-" if value is None else str(value)), _plain(reason))
    return "Decisions", table


def _disk_and_time(costs: dict[str, Any]) -> tuple[str, Table]:
    disk, work = costs["disk"], costs["work"]
    table = _table("what", ">figure", "how")
    number = disk["num_checkpoints"]
    kept = "as many as save_steps makes" if number is None else f"{number:,} of them"
    if number != 0:
        table.add_row("a checkpoint", _gb(disk["checkpoint"]), f"weights and optimizer; {kept}")
    table.add_row("result", _gb(disk["result"]), "final weights")
    table.add_row("export", _gb(disk["export"]), "merged, in bfloat16")
    if disk["cache"] is not None:
        table.add_row("cache", _gb(disk["cache"]), "tokenised rows")
    table.add_row("a step", f"{work['step_flops'] / 1e12:,.2f} TFLOP", "over all devices, recomputation included")
    if work["sampling_flops"]:
        how = f"of which sampling answers, at {SAMPLING_UTILISATION:.0%}"
        table.add_row("", f"{work['sampling_flops'] / 1e12:,.2f} TFLOP", how)
    if work["step_seconds"] is not None:
        how = f"at {work['utilisation']:.0%} of {work['rate'] / 1e12:,.2f} TFLOP/s"
        table.add_row("", _duration(work["step_seconds"]), how)
    if work["run_seconds"] is not None:
        table.add_row("the run", _duration(work["run_seconds"]), "all steps, without evaluation and saving")
    return "Disk and time", table


def _because(why: str | None) -> str:
    return f" ({why})" if why else ""


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 100e9 else f"{size / 1e9:,.0f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
