"""One training step on fake tensors in a fake world: its memory, FLOPs and collectives."""
