"""Many runs of one configuration, one after the other, and their figures in one table."""
