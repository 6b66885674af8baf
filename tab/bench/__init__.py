"""The microbenchmark: what each op costs here, against what a user could run instead.

cases → contestants → measure (float64 check, interleaved timing) → results (JSON, table, picture).
`tab bench` and `pytest bench/` both run it.
"""
