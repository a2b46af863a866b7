"""This project against its peers on the same work: `make bench` (see __main__.py)."""
