"""The version of the package; read by pyproject.toml without importing torch."""

__version__ = "0.1.0.dev0"
