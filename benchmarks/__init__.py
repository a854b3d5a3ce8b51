"""Floor 5: benchmarks. Every operator against the code that it replaces, in one run and behind a correctness gate."""
