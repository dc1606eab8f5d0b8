"""Folds of prompts, the same in every process: by a hash of the prompt's label and a seed."""

import hashlib
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor


def digest(labels: Iterable[Hashable]) -> Tensor:
    """`(n,)` int64: the same for a label (by its text) in every process and whatever Python's hash seed."""
    hashes = (hashlib.blake2b(str(label).encode(), digest_size=8).digest() for label in labels)
    return torch.tensor([int.from_bytes(value, "big", signed=True) for value in hashes], dtype=torch.int64)


def shuffled(labels: Tensor, seed: int) -> Tensor:
    """Order of distinct digests that depends on their set and on the seed alone: `(n,)` int64 of places."""
    keys = digest(f"{seed}:{label}" for label in labels.tolist())
    return keys.argsort()


def assign_folds(prompts: Tensor, num_folds: int, seed: int) -> Tensor:
    """Deal the prompts, in an order that the seed decides, to folds of nearly equal numbers of prompts.

    Args:
        prompts: `(num_rows,)` int64 digests.
        num_folds: At least 2; no more folds than prompts are made.
        seed: Another seed gives other folds.

    Returns:
        `(num_rows,)` int64 fold of each row.
    """
    distinct, position = torch.unique(prompts, return_inverse=True)
    fold = torch.empty_like(distinct)
    fold[shuffled(distinct, seed)] = torch.arange(distinct.numel()) % num_folds
    return fold[position]
