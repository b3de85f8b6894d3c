"""A small transformer learns the Python of the standard library, byte by byte: a PyTorch trainer with `fastlr.torch`.

Groups with and without weight decay, a schedule, clipping and a moving average of the weights, all in `opt.step()`.
Halfway the run is saved and goes on with `torch.optim`'s AdamW, then comes back: the state is the same dict.
"""

from __future__ import annotations

import argparse as source_1
import ast as source_2
import io
import pathlib as source_3
import statistics
import time
import typing as source_4
from pathlib import Path

import torch
from torch import nn

import fastlr.torch
from fastlr.schedules import Cosine

STEPS, BATCH, CONTEXT, WIDTH, HEADS, LAYERS = 240, 24, 48, 96, 4, 2


class Transformer(nn.Module):
    """Predicts the next byte: pre-norm blocks with causal attention, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.place = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores for the byte after each byte."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.norm(self.blocks(self.embed(x) + self.place[: x.shape[1]], mask, is_causal=True)))


def text() -> torch.Tensor:
    """The source of some modules of the standard library, as bytes."""
    modules = (source_1, source_2, source_3, source_4)
    return torch.tensor(list(b"".join(Path(m.__file__ or "").read_bytes() for m in modules)))


def main() -> None:
    """Train, with a visit to torch.optim."""
    torch.manual_seed(0)
    corpus = text()
    train, held = corpus[: -len(corpus) // 10], corpus[-len(corpus) // 10 :]
    model = Transformer()

    def loss_on(data: torch.Tensor) -> torch.Tensor:
        first = torch.randint(len(data) - CONTEXT - 1, (BATCH,))
        batch = data[first[:, None] + torch.arange(CONTEXT + 1)]
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def held_out() -> float:
        with torch.no_grad():
            return sum(loss_on(held).item() for _ in range(20)) / 20

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    schedule = Cosine(3e-3, steps=STEPS - 20, end=3e-4).warmup(20)
    opt = fastlr.torch.AdamW(groups, lr=schedule, betas=(0.9, 0.95), clip_norm=1.0, ema=0.95)
    before, spent = held_out(), []
    for k in range(STEPS):
        opt.zero_grad()
        loss = loss_on(train)
        loss.backward()
        began = time.perf_counter()
        opt.step()
        spent.append(time.perf_counter() - began)
        if k % 60 == 59:
            print(f"step {opt.info.step}: loss {loss.item():.3f}, lr {opt.info.lr:.2e}, norm {opt.info.grad_norm:.2f}")
        if k == STEPS // 2:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            visitor = torch.optim.AdamW([{"params": g["params"]} for g in groups])
            visitor.load_state_dict(torch.load(file))
            visitor.step()  # with the gradient once more: it knows state, rate and decay
            opt.load_state_dict(visitor.state_dict())
    after = held_out()
    last = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():  # opt.ema is in the order of the groups
        for p, average in zip([p for g in groups for p in g["params"]], opt.ema, strict=True):
            p.copy_(average)
    averaged = held_out()
    count = sum(p.numel() for p in last)
    print(f"held-out loss {before:.2f} before, {after:.2f} after, {averaged:.2f} with the averaged weights")
    print(f"{statistics.median(spent) * 1e6:.0f} us a step for clipping, AdamW and the average of {count:,} parameters")
    assert after < 0.6 * before, "it has not learned"


if __name__ == "__main__":
    main()
