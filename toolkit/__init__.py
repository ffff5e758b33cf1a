"""edgekit: prune a trained vision model until its measured latency is inside a budget.

`toolkit.api` is the Python interface; importing either loads no framework.
"""
