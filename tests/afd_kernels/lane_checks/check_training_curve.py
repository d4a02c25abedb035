"""Swapping `impl` changes a short training curve by rounding only (run by ../test_lanes.py)."""

import torch
from torch import Tensor, nn

from afd_kernels import adaln_modulate, add_noise_and_target, gated_residual, nft_loss, rope_3d_table, rope_qk_norm
from afd_kernels.dispatch import is_interpreting

DEVICE = "cpu" if is_interpreting() else "cuda"
NUM_STEPS, SAMPLES, FRAMES, SIDE, CHANNELS, HEADS = 20, 2, 3, 2, 6, 3


class OneBlock(nn.Module):
    """One transformer block built from the operations under test; one token per latent pixel."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.impl = impl
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.modulation = nn.Linear(1, 3 * CHANNELS)
        self.q_weight, self.k_weight = nn.Parameter(torch.ones(CHANNELS)), nn.Parameter(torch.ones(CHANNELS))
        self.table = rope_3d_table(FRAMES, SIDE, SIDE, CHANNELS // HEADS)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        tokens = x_t.flatten(2).transpose(1, 2)  # [N, F * H * W, C]
        shift, scale, gate = self.modulation(t[..., None]).chunk(3, dim=-1)
        hidden = adaln_modulate(tokens, shift, scale, impl=self.impl)
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        cos, sin = (x.to(q.device) for x in self.table)
        q, k = rope_qk_norm(q, k, self.q_weight, self.k_weight, cos, sin, num_heads=HEADS, impl=self.impl)
        v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        tokens = gated_residual(tokens, self.out(mixed.transpose(1, 2).flatten(2)), gate, impl=self.impl)
        return tokens.transpose(1, 2).reshape(x_t.shape)


def train(impl: str) -> list[float]:
    model = OneBlock(impl).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(NUM_STEPS):
        x0, eps = (torch.randn(SAMPLES, CHANNELS, FRAMES, SIDE, SIDE, generator=generator).to(DEVICE) for _ in range(2))
        t = torch.rand(SAMPLES, FRAMES, generator=generator).to(DEVICE)
        w = torch.rand(SAMPLES, generator=generator).to(DEVICE)
        x_t, v_target = add_noise_and_target(x0, eps, t, impl=impl)
        v = model(x_t, t)
        loss = nft_loss(v, 0.9 * v.detach(), v_target, t, w, nft_beta=0.5, impl=impl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_agree_to_rounding():
    torch.testing.assert_close(train("triton"), train("reference"), rtol=2e-5, atol=1e-6)
