"""The attention of BigBird and DeepSeek-V3 in transformers, by TAB: modules keep their weights and
projections, and what stands between is tab.sparse_attention and tab.mla_attention."""

import numpy as np
import torch
from swap import not_applicable, ours
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

import tab

# --- BigBird --------------------------------------------------------------------------------------


def drawn_blocks(self, n: int, block: int) -> torch.Tensor:
    """The blocks of each row but the first and the last that the module draws, (H, nb − 2, r), by
    its own functions and seed. In evaluation it draws none and counts block 0 instead."""
    np.random.seed(self.seed)  # noqa: NPY002, since the module draws from it
    heads, r = self.num_attention_heads, self.num_random_blocks
    if n in (1024, 3072, 4096):
        longest = self.max_seqlen
        rows = [
            self._bigbird_block_rand_mask(longest, longest, block, block, r, last_idx=1024)
            for _ in range(heads)
        ]
        rows = [row[: n // block - 2] for row in rows]
    else:
        lengths, counts = self._get_rand_attn_plan(n, block, r)
        rows = self._bigbird_block_rand_mask_with_head(
            from_seq_length=n, to_seq_length=n, from_block_size=block, to_block_size=block,
            num_heads=heads, plan_from_length=lengths, plan_num_rand_blocks=counts,
        )  # fmt: skip
    return torch.tensor(np.stack(rows), dtype=torch.long)


def how_often(self, n: int, block: int) -> torch.Tensor:
    """How often each row of blocks counts each block of keys, (H, nb, nb): the module lists a block
    twice that is drawn and seen anyway."""
    i = torch.arange(n // block)
    ends = (i == 0) | (i == i[-1])
    fixed = ((i[:, None] - i).abs() <= 1) | ends | ends[:, None]
    count = fixed.long().repeat(self.num_attention_heads, 1, 1)
    drawn = drawn_blocks(self, n, block)
    count[:, 1:-1].scatter_add_(2, drawn, torch.ones_like(drawn))
    return count


@ours
def big_bird(
    self, hidden_states, band_mask=None, from_mask=None, to_mask=None, from_blocked_mask=None,
    to_blocked_mask=None, output_attentions=None,
):  # fmt: skip
    b, n, _ = hidden_states.shape
    if n % self.block_size:
        raise ValueError(f"{n} tokens are no whole blocks of {self.block_size}")
    q, k, v = (
        project(hidden_states).view(b, n, self.num_attention_heads, -1)
        for project in (self.query, self.key, self.value)
    )
    count = how_often(self, n, self.block_size)
    real = to_mask[:, 0, 0].bool()

    def attend(v):
        """Blocks that count m times: parts whose lse merge, each counting every block once."""
        o = lse = None
        for times in range(1, int(count.max()) + 1):
            part = tab.BlockPattern.from_blocks(count >= times, self.block_size, n)
            more = tab.sparse_attention(
                q, k, v, part, key_mask=real, layout="bnhd", return_lse=True
            )
            more = more[0].transpose(1, 2), more[1]
            o, lse = more if o is None else tab.merge_attention(o, lse, *more)
        return o.transpose(1, 2)

    o = (attend(v) * from_mask.transpose(1, 2)).reshape(b, n, -1)
    if not output_attentions:
        return o, None
    one = torch.eye(n, dtype=v.dtype)[None, :, None].expand(b, n, v.shape[2], n)
    return o, attend(one).transpose(1, 2)


def beside(self, *args, **kwargs):
    """The suite holds no number that depends on this attention: outputs 5 % too large pass. So each
    call is held against the module's own."""
    out, own = big_bird(self, *args, **kwargs), theirs(self, *args, **kwargs)
    torch.testing.assert_close(out[0], own[0])
    return out


theirs = BigBirdBlockSparseAttention.forward
BigBirdBlockSparseAttention.forward = beside

# --- DeepSeek-V3 ----------------------------------------------------------------------------------


def read_mask(mask: torch.Tensor | None, n: int) -> dict[str, torch.Tensor]:
    """The options of TAB that say what the model's mask (B, 1, N, N) does."""
    if mask is None:
        return {}
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    i, causal = torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril()
    if len(seen) == 1 and seen[0].diagonal().all():  # sequences one behind the other
        first = seen[0].int().argmax(-1) == i
        document = first.cumsum(0)
        if torch.equal(seen[0], causal & (document[:, None] == document)):
            return {"cu_seqlens": torch.cat([i[first], torch.tensor([n])]).int()}
    real = seen[:, -1]
    if not torch.equal(seen[real], (causal & real[:, None])[real]):
        not_applicable("a mask of the caller's own: mla_attention is causal or sees all real keys")
    return {"key_mask": real}


@ours
def latent(
    self, hidden_states, position_embeddings, attention_mask, past_key_values=None,
    cache_position=None, **kwargs,
):  # fmt: skip
    """Prompts and training. With tokens in transformers' cache, which keeps the keys and values of
    every head, the latents are gone."""
    b, n, _ = hidden_states.shape
    if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
        not_applicable("a cache of every head's keys and values: TAB keeps latents (tab.MLACache)")
    if not isinstance(attention_mask, torch.Tensor | None):
        not_applicable("FlexAttention's mask")
    if self.training and self.attention_dropout:
        not_applicable("no dropout of attention weights")
    nope, rope = self.qk_nope_head_dim, self.qk_rope_head_dim
    if self.q_lora_rank is None:
        q = self.q_proj(hidden_states)
    else:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
    q, q_rope = q.view(b, n, -1, nope + rope).transpose(1, 2).split([nope, rope], -1)
    c, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, rope], -1)
    c = self.kv_a_layernorm(c)
    turn = deepseek.apply_rotary_pos_emb
    if self.config.rope_interleave:
        turn = deepseek.apply_rotary_pos_emb_interleave
    q_rope, k_rope = turn(q_rope, k_rope[:, None], *position_embeddings)
    weight = self.kv_b_proj.weight.view(-1, nope + self.v_head_dim, self.kv_lora_rank)
    w_uk, w_uv = weight.split([nope, self.v_head_dim], 1)
    if past_key_values is not None:
        heads = torch.einsum("bnr,hdr->bhnd", c, weight)
        k, v = heads.split([nope, self.v_head_dim], -1)
        k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], -1)
        past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
    o = tab.mla_attention(
        q, q_rope, c, k_rope[:, 0], w_uk, w_uv, causal=True, scale=self.scaling,
        form="fused", **read_mask(attention_mask, n),
    )  # fmt: skip
    return self.o_proj(o.transpose(1, 2).reshape(b, n, -1)), None


def forward(self, *args, **kwargs):
    """ "eager" stays the peer's own: it is what the suite compares the others with."""
    own = self.config._attn_implementation == "eager"
    return (eager if own else latent)(self, *args, **kwargs)


eager = deepseek.DeepseekV3Attention.forward
deepseek.DeepseekV3Attention.forward = forward
