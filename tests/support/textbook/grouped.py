"""Grouped heads for the tests: k and v with fewer heads than q, and the textbook of it."""

from textbook.softmax import draw


def given(b, h, kv, n, d, dv=None, **options):
    (q, *_), (_, k, v) = draw(b, h, n, d, **options), draw(b, kv, n, d, dv, seed=1, **options)
    return q, k, v


def repeated(attention):
    """Head h of q meets head ⌊h·H_kv/H⌋ of k and v."""

    def grouped(q, k, v):
        times = q.shape[1] // k.shape[1]
        return attention(q, *(x.repeat_interleave(times, 1) for x in (k, v)))

    return grouped
