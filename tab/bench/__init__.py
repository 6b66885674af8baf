"""The microbenchmark: what each op costs here, against what a user could run instead.

ops/<op>.py (what is known of one op) → measure (float64 check, timing in turns) → rows → results
(JSON, table, picture). `tab bench` and `pytest bench/` both run it.
"""
