"""How to serve a model on GPUs of measured tables: degrees, stages, replicas, and what they hold in memory.

``rules``: what each engine accepts. ``footprint``: bytes on every GPU. ``forms``: a replica's degrees and stages.
``offers``: what a form does under a load. ``search``: how many of which.
"""
