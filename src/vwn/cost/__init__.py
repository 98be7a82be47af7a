"""What a model, a connection and a training run cost."""
