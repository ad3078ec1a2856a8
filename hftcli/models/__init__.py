"""Checkpoints: what they are, how they are loaded, saved, compared and calculated with."""
