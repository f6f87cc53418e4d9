"""``feather-kernels gpu-report``: what the kernels do on a user's GPU, in one JSON and one Markdown file.

``report`` runs the parts (``parts``), each in a process of its own (``part``), and writes what they found; ``page``
renders it. ``clock`` and ``layers`` serve the benchmarks of the checkout too.
"""
