"""Checkpoint files: written atomically, verified, read without unpickling code."""
