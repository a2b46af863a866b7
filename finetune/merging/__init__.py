"""Folding an adapter into its base, and proving the result."""
