"""Deep Q-learning in PyTorch: clipping, Adam and the target network's average in one pass over all weights.

The environment is a cart with a pole on it (Barto, Sutton and Anderson 1983, doi:10.1109/TSMC.1983.6313077, the
appendix' equations), 32 of them side by side. `ema_out=target.parameters()` writes the average into the target network
where it is; the loss, the networks and the replay memory are plain PyTorch.
"""

from __future__ import annotations

import copy
import math
import statistics
import time

import torch
from torch import nn

import fastlr.torch

CARTS, STEPS, BATCH, MEMORY = 32, 2_500, 256, 40_000
DISCOUNT, LIMIT = 0.99, 500  # an episode ends after so many steps if the pole is still up


class Carts:
    """Carts with poles; a pole that tips by 12 degrees or a cart that leaves the track ends an episode."""

    def __init__(self, count: int) -> None:
        self.state = torch.empty(count, 4).uniform_(-0.05, 0.05)
        self.age = torch.zeros(count)

    def step(self, push_right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Push each cart; the states after it, and which poles have fallen. Those begin anew."""
        gravity, cart, pole, half_length, dt = 9.8, 1.0, 0.1, 0.5, 0.02
        x, v, angle, spin = self.state.unbind(1)
        force = torch.where(push_right, 10.0, -10.0)
        sin, cos = angle.sin(), angle.cos()
        pushed = (force + pole * half_length * spin**2 * sin) / (cart + pole)
        turn = (gravity * sin - cos * pushed) / (half_length * (4 / 3 - pole * cos**2 / (cart + pole)))
        move = pushed - pole * half_length * turn * cos / (cart + pole)
        after = torch.stack([x + dt * v, v + dt * move, angle + dt * spin, spin + dt * turn], 1)
        fallen = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > math.radians(12))
        self.age += 1
        over = fallen | (self.age >= LIMIT)
        fresh = torch.empty_like(after).uniform_(-0.05, 0.05)
        self.state = torch.where(over[:, None], fresh, after)
        self.age[over] = 0
        return after, fallen


def balanced(network: nn.Module, count: int = 64) -> float:
    """For how many steps the network keeps a pole up, on average."""
    carts, up, steps = Carts(count), torch.ones(count, dtype=torch.bool), torch.zeros(count)
    with torch.no_grad():
        for _ in range(LIMIT):
            steps += up
            up = up & ~carts.step(network(carts.state).argmax(1) == 1)[1]
    return steps.mean().item()


def main() -> None:
    """Train, and compare the step with PyTorch's separate calls."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    target = copy.deepcopy(network)
    opt = fastlr.torch.Adam(network.parameters(), lr=5e-4, clip_norm=10.0, ema=0.99, ema_out=target.parameters())
    carts = Carts(CARTS)
    memory = torch.zeros(MEMORY, 10)  # state, push, state after, fallen
    before, spent = balanced(network), []
    for k in range(STEPS):
        state = carts.state
        with torch.no_grad():
            push = network(state).argmax(1) == 1
        explore = torch.rand(CARTS) < max(0.05, 1 - k / 600)
        push = torch.where(explore, torch.rand(CARTS) < 0.5, push)
        after, fallen = carts.step(push)
        rows = (torch.arange(CARTS) + k * CARTS) % MEMORY
        memory[rows] = torch.cat([state, push[:, None], after, fallen[:, None]], 1)
        batch = memory[torch.randint(min((k + 1) * CARTS, MEMORY), (BATCH,))]
        state, pushed, after, ended = batch[:, :4], batch[:, 4].long(), batch[:, 5:9], batch[:, 9]
        with torch.no_grad():  # double Q-learning: van Hasselt et al. 2016, arXiv:1509.06461, eq. 4
            best = network(after).argmax(1, keepdim=True)
            value = 1 + DISCOUNT * (1 - ended) * target(after).gather(1, best).squeeze(1)
        loss = nn.functional.smooth_l1_loss(network(state).gather(1, pushed[:, None]).squeeze(1), value)
        opt.zero_grad()
        loss.backward()
        began = time.perf_counter()
        opt.step()
        spent.append(time.perf_counter() - began)
    after_training = balanced(target)
    print(f"the pole stays up for {before:.0f} of {LIMIT} steps before training, {after_training:.0f} after")
    print(
        f"{statistics.median(spent) * 1e6:.0f} us a step for clipping, Adam and the target network, gradient norm "
        f"{opt.info.grad_norm:.3f}"
    )
    assert after_training > 100, "it has not learned"


if __name__ == "__main__":
    main()
