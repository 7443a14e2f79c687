"""Prints one row per run below the given folders, worst first, and makes each run's page."""

from diagnostics.cli import report

if __name__ == "__main__":
    report()
