"""Save a model where others can load it."""
