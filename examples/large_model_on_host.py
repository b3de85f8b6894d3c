"""A model in bfloat16 whose float32 masters and optimizer state are on the host, in memory-mapped files.

The recipe for a model that leaves no room for its optimizer: weights and gradients in bfloat16 (2 + 2 bytes a
parameter, on a GPU if there is one), masters and AdamW's two states on the host (12 bytes), clipping and the test for
NaN and Inf included. Gradients come and weights go in chunks while the host updates. Here the model is small, and the
state in files that the system may page out; leave `alloc` away for plain memory, pinned if the model is on a GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastlr
import fastlr.torch
from fastlr.schedules import Linear

STEPS, BATCH, CONTEXT, WIDTH = 60, 64, 12, 384


class Mapped:
    """Memory in files of a folder: `alloc=Mapped(folder)`."""

    def __init__(self, folder: str) -> None:
        self.folder, self.files = Path(folder), 0

    def __call__(self, nbytes: int) -> np.ndarray:
        """A writable buffer of so many bytes."""
        self.files += 1
        return np.memmap(self.folder / f"{self.files}.buffer", np.uint8, "w+", shape=(nbytes,))


def main() -> None:
    """Train a byte-level language model on fastlr's own sources."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = sorted(Path(fastlr.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)), device=device)
    model = nn.Sequential(
        nn.Embedding(256, 32),
        nn.Flatten(),
        nn.Linear(32 * CONTEXT, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, 256),
    ).to(device, torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    losses, spent = [], []
    with tempfile.TemporaryDirectory() as folder:
        opt = fastlr.torch.HostOptimizer(
            model.parameters(),
            fastlr.AdamW,
            lr=Linear(3e-3, 3e-4, steps=STEPS),
            weight_decay=0.01,
            clip_norm=1.0,
            skip_nonfinite=True,
            alloc=Mapped(folder),
        )
        for _ in range(STEPS):
            first = torch.randint(len(text) - CONTEXT, (BATCH,), device=device)
            context = text[first[:, None] + torch.arange(CONTEXT, device=device)]
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(context).float(), text[first + CONTEXT])
            loss.backward()
            began = time.perf_counter()
            opt.step()
            spent.append(time.perf_counter() - began)
            losses.append(loss.item())
        held = opt.nbytes / count
        print(f"{count:,} parameters on {device}: 4 bytes each for weight and gradient, {held:.0f} on the host")
        step = statistics.median(spent)
        print(f"{step * 1e3:.2f} ms a step, {28 * count / step / 1e9:.1f} GB/s at 28 bytes a parameter")
        print(f"loss {np.mean(losses[:5]):.2f} at the start, {np.mean(losses[-5:]):.2f} after {opt.info.step} steps")
        masters = [opt.state[p]["master"] for p in model.parameters()]
        assert all(
            torch.equal(m.bfloat16(), p.detach().cpu()) for m, p in zip(masters, model.parameters(), strict=True)
        )
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), "it has not learned"
        del opt, masters


if __name__ == "__main__":
    main()
