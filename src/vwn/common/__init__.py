"""Parts that every other package may use: errors, extras, files, caches, processes, memory, provenance."""
