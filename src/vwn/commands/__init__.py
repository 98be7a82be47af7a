"""Use a finished model: generate, evaluate, inspect."""
