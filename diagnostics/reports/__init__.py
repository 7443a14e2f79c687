"""Reports: records and run logs in, figures and pages out. No torch, and matplotlib only when a figure is drawn."""
