"""What several examples share: data sets, models, baselines, command-line arguments, progress."""
