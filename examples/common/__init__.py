"""Modules that examples share: data sets, models, baselines, command-line arguments, progress."""
