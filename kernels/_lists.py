"""The work list of block-sparse attention, for rows forward and for columns backward.

Long rows are cut so that a few (BigBird's global ones) do not keep the GPU waiting. The grid must
not depend on the pattern's values, only on shapes, or the host would wait for the device:

    item w < Hp·nb    row w, or where it lists more than CUT columns, those up to the next multiple
                      of CUT in `col`
    the others        one for each inner multiple of CUT in `col` (nnz is a shape): the columns from
                      there, if they belong to a long row; else nothing

Parts of a row go to slots, which are merged in order. Where no row can list more than CUT columns,
the grid is the rows.
"""

import triton
import triton.language as tl


@triton.jit
def owner(ptr, position, nb, lists):
    """The list (of Hp·nb) that entry `position` belongs to: the last that starts at or before it.
    ptr (Hp, nb+1) does not decrease."""
    low, high = tl.zeros((), tl.int32), lists + lists // nb - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(ptr + middle) <= position:
            low = middle
        else:
            high = middle - 1
    return low - low // (nb + 1)


@triton.jit
def work(ptr, item, nb, lists, CUT: tl.constexpr):
    """-> list, its first and last + 1 entry in this item, the slot of the result: −1 if it is the
    list's whole result, −2 if there is nothing to do."""
    if item < lists:
        which = item
        start = tl.load(ptr + which + which // nb)
        end = tl.load(ptr + which + which // nb + 1)
        first, slot = start, -1
        if end - start > CUT:
            end = (start // CUT + 1) * CUT
            slot = end // CUT * 2
    else:
        first = (item - lists + 1) * CUT
        which = owner(ptr, first, nb, lists)
        start = tl.load(ptr + which + which // nb)
        end = tl.load(ptr + which + which // nb + 1)
        slot = first // CUT * 2 + 1
        if (end - start <= CUT) | (first == start):
            slot = -2
        end = tl.minimum(end, first + CUT)
    return which, first, end, slot


@triton.jit
def parts(ptr, item, nb, lists, CUT: tl.constexpr):
    """-> list, first slot, number of parts, if `item` (from 0) is the first inner multiple of CUT
    in a long list; else 0 parts."""
    position = (item + 1) * CUT
    which = owner(ptr, position, nb, lists)
    start = tl.load(ptr + which + which // nb)
    end = tl.load(ptr + which + which // nb + 1)
    count = 1 + tl.cdiv(end - position, CUT)
    if (end - start <= CUT) | (position == start) | (position - start > CUT):
        count = 0
    return which, position // CUT * 2, count


@triton.jit
def slot_of(first, part):
    """first, then first + 1, + 3, + 5 …"""
    return first + tl.maximum(2 * part - 1, 0)


@triton.jit
def below(entries, first, last, bound):
    """How many of the sorted entries are < bound."""
    count = 0
    for at in range(first, last, 64):
        x = tl.load(entries + at + tl.arange(0, 64), mask=at + tl.arange(0, 64) < last, other=bound)
        count += tl.sum((x < bound).to(tl.int32), 0)
    return count


@triton.jit
def reach(col, first, last, start, stop, M, shift, b, CAUSAL: tl.constexpr):
    """Of a row's listed blocks of keys: below which all of its queries (start … stop − 1, which
    stand at start + shift …) see all tokens, and the entry behind the last that one sees."""
    full = M // b  # whole blocks
    if CAUSAL:
        last = first + below(col, first, last, tl.cdiv(tl.maximum(stop + shift, 0), b))
        full = tl.minimum(full, tl.maximum(start + shift + 1, 0) // b)
    return full, last


@triton.jit
def batch_head(group, which, nb, lists, H):
    """Flat (batch, head). Group g of B·H/Hp: with one list for all heads g itself, else a batch."""
    hp = lists // nb
    each = H // hp  # heads that share a list
    return group // each * H + which // nb * each + group % each
