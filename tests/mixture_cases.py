"""Mixtures that every way of computing one is tested with: ranks of the experts, and top-k."""

CASES = {
    "mixed ranks": ((3, 8, 1, 5), 2),
    "one expert": ((4,), 1),
    "all chosen": ((2, 3, 5), 3),
    "top-1": ((3, 1, 2), 1),
    "rank 1": ((1, 1, 1, 1, 1), 2),
    "many": ((2,) * 9, 4),
}
