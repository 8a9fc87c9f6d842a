"""The version of the library, readable without importing it."""

__version__ = "0.1.0"
