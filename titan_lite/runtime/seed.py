"""Seeds and deterministic algorithms."""

import hashlib
import os

import torch


def derive_seed(seed: int, name: str) -> int:
    """A 63-bit seed from (seed, name) alone: not from the process, layout or Python's hash."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def set_determinism(seed: int, *, deterministic: bool) -> None:
    """Seeds torch's default generators and, if deterministic, refuses non-deterministic
    algorithms."""
    torch.manual_seed(seed)
    if deterministic:
        # Read by cuBLAS when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
