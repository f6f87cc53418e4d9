"""``feather-kernels gpu-report``: tests and measures the kernels on a user's GPU, into one JSON and one Markdown file.

``report`` runs the parts listed in ``parts``, each in a process of its own (``part``), and ``page`` renders what they
found. ``place`` says where they run. The benchmarks use ``clock`` and ``layers`` too.
"""
