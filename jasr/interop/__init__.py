"""Weights of other systems: files read without running anything from them, tables of names."""
