"""Comparisons: arms, studies, learning-rate sweeps, and running them one after the other."""
