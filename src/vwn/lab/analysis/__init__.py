"""What the curves of a comparison say: paired differences, speed-ups, fits and verdicts, from numbers to numbers."""
