"""Whether diagnoses agree with what becomes of runs: labels by outcome alone, then diagnoses held against them."""
