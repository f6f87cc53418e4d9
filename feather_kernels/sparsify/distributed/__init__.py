"""Sparse training of weights that are sharded over processes: selection, counts, consistency.

Nothing here is imported, and no communication is set up, where all weights are whole.
"""
