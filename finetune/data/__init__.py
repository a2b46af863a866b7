"""From files to supervised tokens."""
