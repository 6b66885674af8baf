"""`shapes`: a drawn image set of ten classes, for machines without CIFAR-10.

Each image is one outline f(u, v) ≤ 0 in its own turned, stretched and moved frame, painted in a
random colour over a random background, among distractors and under noise. Colour, brightness and
place say nothing about the class: both colours, the gradients and the distractors are drawn from
the same distribution for every class. Pure numpy, a function of the seed alone.
"""

from __future__ import annotations

import numpy as np

SIDE = 32  # pixels
CHUNK = 500  # images drawn at once: the working set stays in the cache

# One outline a class, in the frame of the shape: |u|, |v| ≲ 1, inside where the value is ≤ 0.
OUTLINES = {
    "disk": lambda u, v: np.hypot(u, v) - 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "frame": lambda u, v: np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.68) - 0.2,
    "triangle": lambda u, v: np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.55,
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 1, np.abs(v) - 0.3), np.maximum(np.abs(u) - 0.3, np.abs(v) - 1)
    ),
    "star": lambda u, v: np.hypot(u, v) - 0.65 - 0.35 * np.cos(5 * np.arctan2(v, u)),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.75 - np.hypot(u - 0.5, v)),
    "half": lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1, -0.4 - v),
    "bars": lambda u, v: np.maximum(np.abs(np.abs(u) - 0.6) - 0.25, np.abs(v) - 0.9),
}
CLASSES = tuple(OUTLINES)


def draw(count: int, *, seed: int, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """count images uint8 (count, 32, 32, 3) and labels int64 (count,), classes as even as can be.

    (seed, stream) names the random sequence: stream 0 for training, 1 for test.
    """
    rng = np.random.default_rng([seed, stream])
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(CLASSES))
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for start in range(0, count, CHUNK):
        images[start : start + CHUNK] = _draw(labels[start : start + CHUNK], rng)
    return images, labels


def _draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(labels)
    v, u = np.mgrid[:SIDE, :SIDE].astype(np.float32) - (SIDE - 1) / 2  # (32, 32) pixels

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    # Background: a colour, a gradient or wave of another colour, noise below.
    back, front, tint = (uniform(30, 225, 1, 1, 3) for _ in range(3))  # (n, 1, 1, 3)
    # Enough contrast to be seen, in either direction.
    front = np.where(
        np.abs(front - back).mean(-1, keepdims=True) < 45, (back + 128) % 256, front
    ).astype(np.float32)
    kx, ky = uniform(-0.5, 0.5, 1, 1), uniform(-0.5, 0.5, 1, 1)
    wave = np.sin(kx * u + ky * v + uniform(0, 6.28, 1, 1))[..., None]  # (n, 32, 32, 1)
    image = back + 0.3 * wave * (tint - 128)  # (n, 32, 32, 3)

    # Two distractors: small discs and strokes, of colours drawn like those of the shape.
    for long in (1.0, 3.5):
        x, y = u - uniform(-14, 14, 1, 1), v - uniform(-14, 14, 1, 1)  # (n, 32, 32)
        x, y = _turn(x, y, uniform(0, 3.14, 1, 1))
        cover = np.clip(uniform(1, 2.5, 1, 1) + 0.5 - np.hypot(x / long, y), 0, 1)[..., None]
        image += cover * (uniform(30, 225, 1, 1, 3) - image)

    # The shape, in its own frame: moved, turned by up to 35° either side, stretched.
    size, stretch = uniform(6.5, 11, 1, 1), uniform(0.85, 1.18, 1, 1)
    x, y = u - uniform(-4, 4, 1, 1), v - uniform(-4, 4, 1, 1)
    x, y = _turn(x, y, uniform(-0.6, 0.6, 1, 1))
    x, y = x / (size * stretch), y / (size / stretch)
    for label, outline in enumerate(OUTLINES.values()):
        mine = labels == label
        # Half a pixel of the outline on either side is mixed: no jagged edges.
        cover = np.clip(0.5 - outline(x[mine], y[mine]) * size[mine], 0, 1)[..., None]
        image[mine] += cover * (front[mine] - image[mine])

    image += rng.standard_normal(image.shape, np.float32) * uniform(8, 30, 1, 1, 1)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _turn(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x
