"""What the commands do with a finished model."""
