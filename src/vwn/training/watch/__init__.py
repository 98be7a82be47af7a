"""Watch a run: its health, bad steps, signals."""
