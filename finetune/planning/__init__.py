"""What a run will be, computed from the configuration alone."""
