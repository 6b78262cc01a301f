"""The decoder, its files and its adapters."""

from .adapter import load_adapter, save_adapter
from .config import ModelConfig
from .decoder import CausalLM
from .io import load_model, save_model
from .lora import LoraConfig, adapter_parameters, add_lora, merge_lora, remove_lora, unmerge_lora
from .quantize import dequantize_model

__all__ = [
    "CausalLM",
    "LoraConfig",
    "ModelConfig",
    "adapter_parameters",
    "add_lora",
    "dequantize_model",
    "load_adapter",
    "load_model",
    "merge_lora",
    "remove_lora",
    "save_adapter",
    "save_model",
    "unmerge_lora",
]
