"""What every other package may use: errors, files, caches, processes."""
