"""Compare models: train them, analyse their curves, report."""
