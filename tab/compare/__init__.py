"""Comparisons: the grid of runs, who drives it, what it leaves on disk, and the verdicts."""
