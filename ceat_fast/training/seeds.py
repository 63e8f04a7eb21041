"""Independent random streams from one seed: none depends on how many numbers another one drew."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *stream: str | int) -> int:
    """Seed in [0, 2^63) of a named stream, for example `stream_seed(0, "attack", epoch)`."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *stream))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
