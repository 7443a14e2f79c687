"""Example trainers: tasks, models and a loop that the scripts run and that a reader may copy."""
