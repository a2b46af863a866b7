"""The thesis as an experiment: every arm at three learning rates, what each learned against what it forgot."""
