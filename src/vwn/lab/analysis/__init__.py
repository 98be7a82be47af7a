"""What the curves of a comparison say: paired differences, speed-ups and fits, from numbers to numbers."""
