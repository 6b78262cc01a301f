"""The public ops of forge_core. One op, one name: see docs/architecture.md for the five places of each."""

# With the source folder on sys.path (`python -m pytest`, `python -c`) transformers takes this folder for the package
# `kernels` and imports it: it must then find an empty module, not load the op libraries a second time.
if __name__ == "forge_core.kernels":
    from .adamw import AdamWTensors, adamw_
    from .add_rms_norm import add_rms_norm
    from .decode_attention import decode_attention
    from .decode_layers import decode_layers
    from .decode_stack import DecodeLayer, DecodeLinear, DecodeStack
    from .frozen_linear import frozen_linear
    from .gradient_norm import gradient_norm
    from .library import empty_cache
    from .linear_argmax import linear_argmax
    from .linear_token_logprobs import linear_token_logprobs
    from .lora_linear import lora_linear
    from .pack import PackPlan, TokenMixer, pack_sequences
    from .packed_attention import document_positions, packed_attention
    from .policy_gradient_loss import PolicyLoss, policy_gradient_loss
    from .registry import available_backends
    from .rms_norm import rms_norm
    from .rope import rope
    from .swiglu import swiglu
    from .weighted_linear_cross_entropy import MixingLoss, weighted_linear_cross_entropy

__all__ = [
    "AdamWTensors",
    "DecodeLayer",
    "DecodeLinear",
    "DecodeStack",
    "MixingLoss",
    "PackPlan",
    "PolicyLoss",
    "TokenMixer",
    "adamw_",
    "add_rms_norm",
    "available_backends",
    "decode_attention",
    "decode_layers",
    "document_positions",
    "empty_cache",
    "frozen_linear",
    "gradient_norm",
    "linear_argmax",
    "linear_token_logprobs",
    "lora_linear",
    "pack_sequences",
    "packed_attention",
    "policy_gradient_loss",
    "rms_norm",
    "rope",
    "swiglu",
    "weighted_linear_cross_entropy",
]
