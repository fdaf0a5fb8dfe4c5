"""Real processes, killed and starved on purpose, and what a run must be in the end all the same."""
