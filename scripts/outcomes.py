"""Labels runs by their outcome, and holds the diagnoses against the labels. The tables are in scripts/outcomes/.

python scripts/outcomes.py label   trains cases.csv with three seeds and writes labels.csv; can be interrupted
python scripts/outcomes.py judge   diagnoses the labelled runs from their logs: agreement.csv and agreement.md
python scripts/outcomes.py heal    trains sick runs with the first remedy of their diagnosis: healing.csv and healing.md

With --held-out they do the same for held_out_cases.csv, with other seeds: configurations that no threshold and no
remedy was chosen on. Their labels are in held_out.csv, the rest in held_out_agreement and held_out_healing. Once their
misses were looked at, --held-out second holds out others: second_held_out_cases.csv and so on. The third set's
configurations were drawn at random, from wider ranges.

Run logs are kept: training happens once, and judging again, with other thresholds, takes seconds.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from diagnostics.outcomes.agreement import agreement_page, heal_each, healing_page, judge
from diagnostics.outcomes.labels import Case, Label, Runs, label, read_table, write_table
from diagnostics.trainers.progress import write_line

TABLES = Path(__file__).parent / "outcomes"


@dataclass(frozen=True)
class Table:
    """The files of one set of configurations, and the seeds that each is trained with."""

    cases: str
    labels: str
    agreement: str
    healing: str
    seeds: tuple[int, ...]


CHOSEN_ON = Table("cases.csv", "labels.csv", "agreement", "healing", (0, 1, 2))
HELD_OUT = Table("held_out_cases.csv", "held_out.csv", "held_out_agreement", "held_out_healing", (3, 4))


def label_runs(runs: Runs, table: Table) -> None:
    """Writes the labels."""
    write_table(TABLES / table.labels, _labels(runs, table))


def _labels(runs: Runs, table: Table) -> Iterator[Label]:
    for case, seed in product(read_table(TABLES / table.cases, Case), table.seeds):
        found = label(runs, case, seed)
        write_line(f"{found.label} {found.reason} {found.overrides} seed {seed}")
        yield found


def judge_runs(runs: Runs, table: Table) -> None:
    """Writes what the verdicts say, as a table and as a page."""
    judgements = [judge(runs, one) for one in read_table(TABLES / table.labels, Label)]
    write_table(TABLES / f"{table.agreement}.csv", judgements)
    (TABLES / f"{table.agreement}.md").write_text(agreement_page(judgements, table.labels), encoding="utf-8")


def heal_runs(runs: Runs, table: Table) -> None:
    """Writes what the first remedies did, as a table and as a page."""
    healings = heal_each(runs, read_table(TABLES / table.labels, Label))
    write_table(TABLES / f"{table.healing}.csv", healings)
    (TABLES / f"{table.healing}.md").write_text(healing_page(healings), encoding="utf-8")


SECOND = Table(
    "second_held_out_cases.csv", "second_held_out.csv", "second_held_out_agreement", "second_held_out_healing", (5, 6)
)
THIRD = Table(
    "third_held_out_cases.csv", "third_held_out.csv", "third_held_out_agreement", "third_held_out_healing", (7, 8)
)
HELD_OUT_TABLES = {"first": HELD_OUT, "second": SECOND, "third": THIRD}
STAGES = {"label": label_runs, "judge": judge_runs, "heal": heal_runs}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--logs", type=Path, default=Path("outputs/outcomes"), help="folder of the runs and their logs")
    parser.add_argument("--held-out", nargs="?", const="first", choices=HELD_OUT_TABLES, help="a set that is held out")
    arguments = parser.parse_args()
    STAGES[arguments.stage](Runs(arguments.logs), HELD_OUT_TABLES.get(arguments.held_out, CHOSEN_ON))
