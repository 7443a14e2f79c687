"""``python -m diagnostics.explain``: the same as the command ``diagnostics-explain``."""

from diagnostics.explain import main

main()
