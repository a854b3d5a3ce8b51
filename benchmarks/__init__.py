"""Measuring: fused code against the code that it replaces, in one run and behind a correctness gate. Not installed."""
