"""What scripts/bench.py is made of: workloads, variants, timing, and the tables."""
