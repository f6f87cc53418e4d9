"""Sparse training of weights that are sharded over processes: selection, counts, consistency.

Where all weights are whole, ``torch.distributed`` is not imported and nothing is communicated.
"""
