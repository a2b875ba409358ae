"""The version of dpkit, which ledgers and reports name."""

__version__ = "0.1.0"
