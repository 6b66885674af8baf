"""local-attention's LocalAttention, by TAB: its module keeps its arguments, embeddings and layer,
and `forward` is tab.local_attention, or tab.sparse_attention where it attends to whole buckets."""

import functools

import torch
from local_attention.local_attention import LocalAttention
from local_attention.rotary import apply_rotary_pos_emb
from swap import not_applicable, ours

import tab


@functools.lru_cache
def buckets(n: int, size: int, before: int, after: int) -> tab.BlockPattern:
    """The bucket of the query, `before` others before it and `after` behind."""
    i = torch.arange(-(-n // size))
    far = i[:, None] - i
    return tab.BlockPattern.from_blocks((far <= before) & (far >= -after), size, n)


@ours
def forward(self, q, k, v, mask=None, input_mask=None, attn_bias=None, window_size=None):
    if attn_bias is not None:
        not_applicable("a bias of any values on the scores: of these TAB has ALiBi's")
    if window_size is not None or self.use_xpos or self.shared_qk:
        not_applicable("neither xPos nor shared queries and keys")
    if self.training and self.dropout.p:
        not_applicable("no dropout of attention weights")
    if self.rel_pos is not None:  # relative, so that positions may count from the first token
        angles, scale = self.rel_pos(k)
        q, k = apply_rotary_pos_emb(q, k, angles, scale=scale)
    mask = input_mask if mask is None else mask
    size, before, after = self.window_size, self.look_backward, self.look_forward
    options = {"causal": self.causal, "scale": self.scale, "key_mask": mask}
    if self.exact_windowsize:
        return tab.local_attention(q, k, v, window=(size * before, size * after), **options)
    return tab.sparse_attention(q, k, v, buckets(q.shape[-2], size, before, after), **options)


LocalAttention.forward = forward
