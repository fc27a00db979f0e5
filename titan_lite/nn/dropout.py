"""Dropout that is the same in every layout.

The draws of a generator depend on the device, their number and their order. Here each token has a
key, computed from the seed, its sample's number in the run and its position. A hash of the key
decides what is dropped. So the result is the same for any split of the batch, the sequence, the
heads or the blocks, on any device, and in recomputation.

Shape suffixes: B batch, S sequence, D model width.
"""

import torch
from torch import Tensor, nn

# Keys are 32 bits in int32: products wrap around, and shifts leave copies of the sign to mask.
_SIGN = -(2**31)


def hash32(keys: Tensor) -> Tensor:
    """Hashes int32 keys one to one; each input bit changes about half of the output bits.

    Source: lowbias32 of github.com/skeeto/hash-prospector.
    """
    keys = (keys ^ (keys >> 16 & 0xFFFF)) * 0x7FEB352D
    keys = (keys ^ (keys >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return keys ^ (keys >> 16 & 0xFFFF)


def token_keys(seed: int, samples_B: Tensor, places_S: Tensor) -> Tensor:
    """Returns int32 keys (B, S) of tokens, from int64 numbers of samples and positions."""
    keys_BS = torch.zeros(len(samples_B), len(places_S), dtype=torch.int32)
    for number in (torch.tensor(seed), samples_B[:, None], places_S):
        low, high = number.to(torch.int32), (number >> 32).to(torch.int32)
        keys_BS = hash32(hash32(keys_BS ^ low) ^ high)
    return keys_BS


def drop(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """Zeroes each of the last dimension's features with probability p, and divides by 1 - p.

    keys: in x's shape without the last dimension.
    """
    features = hash32(torch.arange(x.shape[-1], dtype=torch.int32, device=x.device))
    # Compares as unsigned numbers.
    dropped = hash32(keys.unsqueeze(-1) ^ features) ^ _SIGN < int(p * 2**32) + _SIGN
    return x.masked_fill(dropped, 0) / (1 - p)


class NoDropout(nn.Module):
    """A no-op: keeps all features."""

    def forward(self, x_BSD: Tensor, keys_BS: Tensor | None) -> Tensor:
        return x_BSD


class Dropout(nn.Module):
    """Drops features of tokens with probability p, and none without keys.

    salt: distinguishes the dropouts of a block. shard: index of this device's part of the sequence,
    which is split into equal parts.
    """

    shard = 0

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        self.p = p
        self.salt = salt

    def forward(self, x_BSD: Tensor, keys_BS: Tensor | None) -> Tensor:
        """keys_BS: keys of the whole sequence's tokens."""
        if keys_BS is None:
            return x_BSD
        size = x_BSD.shape[1]
        keys_BS = keys_BS[:, self.shard * size : (self.shard + 1) * size]
        return drop(x_BSD, hash32(keys_BS ^ self.salt), self.p)


def build_dropout(p: float, salt: int) -> Dropout | NoDropout:
    """Returns a dropout, or a no-op if p is 0."""
    return Dropout(p, salt) if p else NoDropout()
