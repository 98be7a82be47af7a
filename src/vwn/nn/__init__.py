"""The paper's parts in plain PyTorch, one module per section."""
