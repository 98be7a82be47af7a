"""Analyse the curves of a comparison: paired differences, speed-ups and fits, from numbers to numbers."""
