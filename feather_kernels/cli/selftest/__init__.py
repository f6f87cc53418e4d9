"""``feather-kernels selftest``: every op on every backend of a device, against exact values, in about a minute.

``checks`` compares the ops with the ``oracle``, and ``command`` prints the outcome and writes the files. Nothing but
the installed package is needed.
"""
