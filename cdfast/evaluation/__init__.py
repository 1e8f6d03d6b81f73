"""Benchmarks: their files and tasks, scoring, several models side by side, lmms-eval."""
