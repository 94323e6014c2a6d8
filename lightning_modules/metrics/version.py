"""The version of this repository and of the package `unirecon_metrics`; every run records it."""

__version__ = "0.2.0"
