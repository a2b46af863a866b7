"""The commands and all printing."""
