"""Training on Hugging Face Trainer: configuration, presets, the few additions to the Trainer, and one run."""
