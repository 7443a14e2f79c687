"""Labels runs by their outcome, and holds the diagnoses against the labels. The tables are in scripts/outcomes/.

python scripts/outcomes.py label   trains cases.csv with three seeds and writes labels.csv; can be interrupted
python scripts/outcomes.py judge   diagnoses the labelled runs from their logs: agreement.csv and agreement.md
python scripts/outcomes.py heal    trains sick runs with the first remedy of their diagnosis: healing.csv and healing.md
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from diagnostics.outcomes.agreement import agreement_page, heal_each, healing_page, judge
from diagnostics.outcomes.labels import Case, Label, Runs, label, read_table, write_table
from diagnostics.trainers.progress import write_line

TABLES = Path(__file__).parent / "outcomes"
SEEDS = (0, 1, 2)


def label_runs(runs: Runs) -> None:
    """Writes labels.csv."""
    write_table(TABLES / "labels.csv", _labels(runs))


def _labels(runs: Runs) -> Iterator[Label]:
    for case in read_table(TABLES / "cases.csv", Case):
        for seed in SEEDS:
            found = label(runs, case, seed)
            write_line(f"{found.label} {found.reason} {found.overrides} seed {seed}")
            yield found


def judge_runs(runs: Runs) -> None:
    """Writes agreement.csv and agreement.md."""
    judgements = [judge(runs, one) for one in read_table(TABLES / "labels.csv", Label)]
    write_table(TABLES / "agreement.csv", judgements)
    (TABLES / "agreement.md").write_text(agreement_page(judgements), encoding="utf-8")


def heal_runs(runs: Runs) -> None:
    """Writes healing.csv and healing.md."""
    healings = heal_each(runs, read_table(TABLES / "labels.csv", Label))
    write_table(TABLES / "healing.csv", healings)
    (TABLES / "healing.md").write_text(healing_page(healings), encoding="utf-8")


STAGES = {"label": label_runs, "judge": judge_runs, "heal": heal_runs}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--logs", type=Path, default=Path("outputs/outcomes"), help="folder of the runs and their logs")
    arguments = parser.parse_args()
    STAGES[arguments.stage](Runs(arguments.logs))
