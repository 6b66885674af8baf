"""Retention, in a package of its own: op.py, layer.py and bench.py are what TAB wants of an op."""
