"""The shapes of the parameters of models that everybody knows."""

from __future__ import annotations


def gpt2() -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 small, 124 million parameters."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def resnet50() -> list[tuple[int, ...]]:
    """The 161 tensors of ResNet-50, 26 million parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    wide = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for k in range(blocks):
            for into, out, size in ((wide, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1)):
                shapes += [(out, into, size, size), (out,), (out,)]
            if k == 0:
                shapes += [(4 * inner, wide, 1, 1), (4 * inner,), (4 * inner,)]
            wide = 4 * inner
    return [*shapes, (1000, 2048), (1000,)]


MODELS = {"GPT-2": gpt2, "ResNet-50": resnet50}
