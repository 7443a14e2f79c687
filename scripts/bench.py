"""Says what watching costs: compares training loops with the fastest stock loop.

    python scripts/bench.py                                        four workloads, all variants; an hour or two
    python scripts/bench.py --quick                                tiny models, seconds; the figures mean nothing
    python scripts/bench.py --workload mlp --variant twin default --clipping never always --rounds 20
    python scripts/bench.py --threads all                          wall time at all threads instead of CPU time at one
    python scripts/bench.py --clip-call --hooks --memory           one clip call; one layer's hooks; memory held
    python scripts/bench.py --json bench.json                      the same tables for a program

A ratio below 1 is faster than the stock loop: zero_grad, forward, backward, torch.nn.utils.clip_grad_norm_,
AdamW(fused=True). Blocks of all variants alternate in random order; the ratio is the median over rounds of the ratios
within a round, with its 95 % bootstrap interval. The twin is the stock loop once more: its distance from 1 is the noise
of the machine. CPU time counts this process alone, not the one in which W&B writes its files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import loops, parts
from benchmark.timing import Clock
from benchmark.variants import VARIANTS
from benchmark.workloads import REGIMES, WORKLOADS, workload

from diagnostics.trainers.provenance import describe_run

TENSORS, ELEMENTS = (10, 100, 1_000, 10_000), (256, 4_096, 65_536, 1_000_000, 10_000_000)
MEMORY_STEPS = (100, 1_000, 2_000)


@dataclass(frozen=True)
class Table:
    """What was measured under the same circumstances."""

    about: Mapping[str, object]
    rows: Sequence[Mapping[str, object]]


def main() -> None:
    """Prints each table as soon as it is there; the JSON file is written anew with each."""
    asked = arguments()
    torch.set_num_threads(1 if asked.threads == "1" else os.cpu_count() or 1)
    clock: Clock = time.process_time if asked.threads == "1" else time.perf_counter
    result = circumstances(asked) | {"tables": []}
    for key in ("processor", "cores", "threads", "clock", "versions", "git", "load_at_start"):
        say(f"{key}: {result[key]}")
    for table in measure(asked, clock):
        say(f"\n{', '.join(f'{key}: {value}' for key, value in table.about.items())}\n{as_text(table.rows)}")
        result["tables"].append(asdict(table))
        result["load_at_end"] = load()
        if asked.json is not None:
            asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"\nload_at_end: {load()}")


def arguments() -> argparse.Namespace:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--workload", choices=WORKLOADS, default=[*WORKLOADS], help=", ".join(WORKLOADS), **several)
    parser.add_argument("--variant", choices=VARIANTS, default=[*VARIANTS], help=", ".join(VARIANTS), **several)
    parser.add_argument("--clipping", choices=REGIMES, default=["never"], help=", ".join(REGIMES), **several)
    parser.add_argument("--micro-batches", type=int, choices=(1, 4), default=[1], nargs="+", help="per step; 1, 4")
    parser.add_argument("--rounds", type=positive, help="blocks of each variant; 10 unless said")
    parser.add_argument("--threads", choices=("1", "all"), default="1", help="CPU time at 1, or wall time at all")
    parser.add_argument("--quick", action="store_true", help="tiny models and blocks, two rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write machine, versions and tables there")
    parser.add_argument("--clip-call", action="store_true", help="instead: one clip call against torch's")
    parser.add_argument("--hooks", action="store_true", help="instead: output-gradient hooks, for each layer")
    parser.add_argument("--memory", action="store_true", help="instead: memory that a Monitor holds, by steps")
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def measure(asked: argparse.Namespace, clock: Clock) -> Iterator[Table]:
    """The tables that were asked for, one after the other."""
    rounds = asked.rounds or (2 if asked.quick else 10)
    timing: dict[str, Any] = {"rounds": rounds, "seconds": 0.01 if asked.quick else 0.3, "clock": clock}
    works = [workload(name, quick=asked.quick) for name in asked.workload]
    if asked.clip_call:
        sizes = (TENSORS[:2], ELEMENTS[:1]) if asked.quick else (TENSORS, ELEMENTS)
        yield table(parts.clip_calls(*sizes, **timing), table="clip_call", rounds=rounds)
    for work in works if asked.hooks else ():
        yield table(parts.hooks(work, **timing), table="hooks", workload=work.name, about=work.about, rounds=rounds)
    for work in works if asked.memory else ():
        steps = (20, 40) if asked.quick else MEMORY_STEPS
        yield table(parts.memory(work, steps), table="memory", workload=work.name, about=work.about)
    if asked.clip_call or asked.hooks or asked.memory:
        return
    for work in works:
        for clipping in asked.clipping:
            for micro_batches in asked.micro_batches:
                regime = {"clipping": clipping, "micro_batches": micro_batches}
                rows = loops.compare(work, asked.variant, **regime, **timing)
                about = {"workload": work.name, "about": work.about, **regime, "rounds": rounds}
                yield table(rows, table="loops", **about)


def table(rows: Any, **about: object) -> Table:
    """A table of dataclasses."""
    return Table(about, [asdict(row) for row in rows])


def circumstances(asked: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, commit, and how time is taken."""
    run = describe_run(
        name="bench",
        directory=Path(),
        command=shlex.join(["python", *sys.argv]),
        overrides=(),
        config={},
        seed=0,
        device="cpu",
    )
    return {
        "started": run.started,
        "command": run.command,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the process" if asked.threads == "1" else "wall time",
        "versions": dict(run.versions),
        "git": dict(run.git),
        "load_at_start": load(),
    }


def processor() -> str:
    """The CPU's name as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> tuple[float, ...]:
    """Load averages over 1, 5 and 15 minutes; empty where the system keeps none."""
    return os.getloadavg() if hasattr(os, "getloadavg") else ()


def as_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Columns of equal width under their names."""
    names = [*rows[0]] if rows else []
    lines = [names, *([cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cell(value: object) -> str:
    """A number to four digits; nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """To the terminal, at once, since the next table takes minutes."""
    print(text, flush=True)  # noqa: T201 -- it speaks to people


if __name__ == "__main__":
    main()
