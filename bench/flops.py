"""FLOPs of whole steps by formula; a percentage of the peak means nothing without it."""

from forge_core.model import ModelConfig

LORA_STEP = (
    "FLOPs of a LoRA step: 4 N tokens (N = weights of all matmuls, forward and dX; the frozen base has no dW) + "
    "6 r (in + out) tokens per adapted matmul + 14 head_dim heads sum(L (L + 1) / 2) per layer, inside documents."
)


def lora_step(config: ModelConfig, lengths: list[int], head_rows: int, rank: int) -> float:
    """FLOPs of one step by `LORA_STEP`; the head counts `head_rows` rows."""
    tokens, c = sum(lengths), config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = [(c.hidden_size, q), (c.hidden_size, kv), (c.hidden_size, kv), (q, c.hidden_size)]
    shapes += [(c.hidden_size, c.intermediate_size)] * 2 + [(c.intermediate_size, c.hidden_size)]
    matmuls = sum(4.0 * k * n + 6.0 * rank * (k + n) for k, n in shapes) * tokens
    attention = 14.0 * c.head_dim * c.num_heads * sum(n * (n + 1) / 2 for n in lengths)
    return c.num_layers * (matmuls + attention) + 4.0 * head_rows * c.hidden_size * c.vocab_size
