"""Evaluate a checkpoint: losses and bits per byte on a text, scores on lm-eval tasks over local files."""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
"""Folder of task files for lm-eval's ``--include_path``."""
