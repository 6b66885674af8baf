"""The operators as functions on (B, H, N, D) tensors: gradients, masks, and a state to go on from.

python examples/use_an_op.py
"""

import torch

import tab

torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 256, 32, requires_grad=True) for _ in range(3))

# Softmax attention within 16 tokens on either side. The cost grows as N, and so does the memory.
o = tab.local_attention(q, k, v, window=16)
o.square().mean().backward()
print("local", tuple(o.shape), "gradient of q", tuple(q.grad.shape))

# Linear attention keeps a state of fixed size: a prompt first, then token by token.
with torch.no_grad():
    whole = tab.linear_attention(q, k, v, causal=True)
    first, state = tab.linear_attention(
        *(x[:, :, :255] for x in (q, k, v)), causal=True, return_state=True
    )
    last = tab.linear_attention(
        *(x[:, :, 255:] for x in (q, k, v)), causal=True, initial_state=state
    )
print("linear, resumed from its state:", (last - whole[:, :, 255:]).abs().max().item())

# Every backend computes the same function.
reference = tab.local_attention(q, k, v, window=16, backend="reference")
print("local, kernel against reference:", (o - reference).abs().max().item())
