"""``feather-kernels gpu-report``: tests and measures the kernels on a user's GPU, into one JSON and one Markdown file.

``report`` runs the parts listed in ``parts``, each in a process of its own (``run_part``), and ``page`` renders what
they found. ``target`` says where they run. The benchmarks use ``clock`` and ``layers`` too.
"""
