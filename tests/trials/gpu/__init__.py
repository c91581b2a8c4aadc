"""Checks of everything that needs a GPU: `make gpu-check` (README.md)."""
