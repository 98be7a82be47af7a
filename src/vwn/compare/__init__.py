"""Comparing arms: running them side by side, analysing their curves, and the report."""
