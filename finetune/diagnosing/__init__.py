"""What is wrong with a run: its evidence brought together from analysis and evaluation, which know nothing of each other."""
