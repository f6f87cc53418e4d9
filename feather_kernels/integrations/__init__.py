"""Adapters for training code written for other packages."""
