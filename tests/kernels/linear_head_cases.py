"""Shapes that the losses over a linear head share: tokens, hidden, vocab."""

from forge_core.kernels import library

# One of each, odd sizes around the 8 x 48 blocks and the 512 logits of a block, several chunks of at most 512 rows, no
# tokens at all.
SIZES = [(1, 1, 1), (1, 7, 5), (9, 33, 49), (70, 64, 515), (1100, 24, 130), (0, 8, 16)]
# Hidden deeper than one block of the matmul, odd and even.
DEEP_SIZES = [(20, 901, 96), (150, 802, 100)]
# For a frozen bfloat16 head, whose logits never lie in memory: the vocabulary in slices with the last panel and block
# not full, rows that fill no task, more rows than one chunk of tasks.
STREAMED_SIZES = [(30, 18, 5003), (150, 66, 100), (2400, 8, 40)]

if library.TRITON_INTERPRETED:  # a program a row, each some milliseconds; chunks of 16 rows, see conftest.py
    SIZES = [(1, 1, 1), (9, 33, 49), (40, 24, 515), (2, 8, 4200), (0, 8, 16)]
    DEEP_SIZES, STREAMED_SIZES = [(3, 901, 20), (2, 8, 17000)], []
