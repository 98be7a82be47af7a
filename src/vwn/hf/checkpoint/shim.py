"""Loads this checkpoint with the installed package vwn. Nothing of the model is defined here."""

from vwn.hf import *  # noqa: F403
