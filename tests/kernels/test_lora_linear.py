import torch

from forge_core.kernels import reference


def test_dropout_bits_are_philox() -> None:
    # Known answer of Philox4x32-10 for key 0 and counter 0 (Salmon et al., kat_vectors): 6627e8d5 e169c58d bc57ac4c
    # 9b00dbd8. A word is kept when it is at least round(p * 2^32).
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for word, position in zip(words, range(4), strict=True):
        for threshold, kept in ((word, True), (word + 1, False)):
            factors = reference.dropout_factors((4,), threshold / 2**32, torch.tensor(0), 0, torch.float64)
            assert bool(factors[position]) == kept
