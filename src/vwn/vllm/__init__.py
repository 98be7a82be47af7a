"""Serve a model with vLLM."""
