"""Seeds and deterministic algorithms."""

import hashlib
import os

import torch


def derive_seed(seed: int, name: str) -> int:
    """Returns a 63-bit seed that depends only on (seed, name): not on process or layout."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def set_determinism(seed: int, *, deterministic: bool) -> None:
    """Seeds torch's generators; if deterministic, non-deterministic algorithms raise an error."""
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads it when its first handle is created.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
