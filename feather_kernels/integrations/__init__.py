"""Doors to other people's training code."""
