"""What ``benchmarks/gpu_check.py`` measures, and how: a file for each concern.

``sizes`` how large; ``networks``, ``faces``, ``scan``, ``checks`` what; ``clock`` and ``compare`` how; ``parts`` in
which order and how long; ``workers`` the processes; ``report`` the JSON and the table.
"""
