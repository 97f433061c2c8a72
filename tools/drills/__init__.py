"""Drills: plan random faults, run a job under them, and compare what is left with a run that was left alone."""
