"""The decoder of every supported architecture: one set of modules, parameterised by `ModelConfig`.

Inputs are packs: token ids of several documents back to back, with `cu_seqlens` marking where each begins. Weights are
read inside the forward of the layer that owns them, so that FSDP2 can gather and free them layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import document_positions, frozen_linear, packed_attention, rope, swiglu

from .config import ModelConfig
from .layers import Embedding, Linear, RMSNorm, project
from .rotary import RotaryTables

if TYPE_CHECKING:
    from forge_core.kernels import PackPlan

    from .lora import LoraConfig

_SEED_MASK = (1 << 63) - 1


class Attend(Protocol):
    """How queries meet keys: inside the documents of a pack, or over the cache of a generation."""

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim] -> like q."""
        ...


class PackedAttend:
    """Attention of every token to the earlier tokens of its own document, and of those that this one continues.

    plan: made for one window; the plans of the other windows of the model follow from it, once per batch.
    """

    def __init__(self, cu_seqlens: Tensor, plan: PackPlan | None, parents: Tensor | None = None) -> None:
        self.cu_seqlens, self.parents = cu_seqlens, parents
        self._plan = plan
        self._plans = {} if plan is None else {plan.window: plan}

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        window = attention.window
        if self._plan is not None and window not in self._plans:
            self._plans[window] = replace(self._plan, window=window)
        return packed_attention(
            q, k, v, self.cu_seqlens, parents=self.parents,
            plan=self._plans.get(window), window=window, softcap=attention.softcap, scale=attention.scale,
        )  # fmt: skip


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, by architecture, query and key norms."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window, self.rope_index = config.layer_windows[index], config.layer_ropes[index]
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.norm_per_head = config.qk_norm == "head"
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            sizes = (config.head_dim, config.head_dim) if self.norm_per_head else (q_size, kv_size)
            self.q_norm, self.k_norm = (_norm(config, size) for size in sizes)

    def forward(
        self, x: Tensor, tables: Sequence[tuple[Tensor, Tensor]], attend: Attend, dropout_seed: int | None = None
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; `tables` holds cos and sin of each rotary embedding."""
        tokens = x.shape[0]
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), dropout_seed)
        if self.q_norm is not None and self.k_norm is not None and not self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(tokens, self.num_heads, self.head_dim)
        k = k.view(tokens, self.num_kv_heads, self.head_dim)
        v = v.view(tokens, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None and self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = tables[self.rope_index]
        q, k = rope(q, k, cos, sin)
        attended = attend(self, q, k, v)
        return self.o_proj(attended.flatten(1), None if dropout_seed is None else dropout_seed + 1)


class MLP(nn.Module):
    """Gated feed-forward block, `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, dropout_seed: int | None = None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        gate, up = project(x, (self.gate_proj, self.up_proj), dropout_seed)
        return self.down_proj(
            swiglu(gate, up, activation=self.activation), None if dropout_seed is None else dropout_seed + 1
        )


class DecoderLayer(nn.Module):
    """One transformer layer; which of its four norms exist, and their names, come from `config.norms`."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.norm_names = config.norms
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        for name in (
            config.norms.pre_attention,
            config.norms.post_attention,
            config.norms.pre_mlp,
            config.norms.post_mlp,
        ):
            if name is not None:
                self.add_module(name, _norm(config, config.hidden_size))

    def forward(
        self,
        x: Tensor,
        tables: Sequence[tuple[Tensor, Tensor]],
        attend: Attend,
        dropout_seed: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden], or only these rows of it (int64)."""
        names = self.norm_names
        attended = self.self_attn(self._normed(names.pre_attention, x), tables, attend, dropout_seed)
        if rows is not None:
            attended, x = attended[rows], x[rows]
        attended = self._normed(names.post_attention, attended)
        if names.pre_mlp is None:
            normed = x = attended + x
        else:
            norm = self.get_submodule(names.pre_mlp)
            assert isinstance(norm, RMSNorm)
            normed, x = norm.after_adding(attended, x)
        fed = self.mlp(normed, None if dropout_seed is None else dropout_seed + 2)
        return x + self._normed(names.post_mlp, fed)

    def _normed(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else self.get_submodule(name)(x)


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, scale=config.embedding_scale)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = _norm(config, config.hidden_size)
        self.rotary = RotaryTables(config)
        self.activation_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        dropout_seed: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """input_ids and positions int64 [tokens] -> [tokens, hidden], or only these rows of it (int64)."""
        x = self.embed_tokens(input_ids)
        tables = self.rotary(positions, x.dtype)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            seed = None if dropout_seed is None else (dropout_seed + 4 * index) & _SEED_MASK
            wanted = rows if index + 1 == len(self.layers) else None
            if recompute:
                # Dropout seeds are arguments, so no generator state has to be saved and restored.
                x = checkpoint(layer, x, tables, attend, seed, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, tables, attend, seed, wanted)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder and its language-model head. `load_model` builds one from a Hugging Face directory.

    Constructed directly, the weights are drawn at random (normal, `initializer_range`; norms the identity) from
    torch's global generator. `state_dict` names are Hugging Face's; a tied head has no entry of its own.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.source: Path | None = None  # the directory the weights came from
        self.dropout_seed = 0  # advances by one with each forward in training mode with adapter dropout
        self.lora_config: LoraConfig | None = None  # set while adapters are attached
        with torch.device(device):
            self.model = Decoder(config)
            self.lm_head = (
                None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
            )
        self.to(dtype)
        if torch.device(device).type != "meta":
            self._initialize()

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab, hidden]; the embedding itself where the head is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def logit_softcap(self) -> float | None:
        """Cap of the logits, `cap * tanh(logits / cap)`; to be passed to the loss as `softcap`."""
        return self.config.logit_softcap

    def forward(
        self, input_ids: Tensor, cu_seqlens: Tensor, *, parents: Tensor | None = None, plan: PackPlan | None = None
    ) -> Tensor:
        """Hidden states of a pack, after the final norm.

        Args:
            input_ids: int64 [tokens].
            cu_seqlens: int32 [documents + 1], document i is tokens cu_seqlens[i]:cu_seqlens[i + 1]. Zero-length
                documents are legal, tokens past the last one belong to no document.
            parents: int32 [documents], the document that each one continues, before it in the pack, or -1. Several
                answers to one prompt are then computed with the prompt once: see packed_attention, and for the loss
                `forge_core.data.answer_rows`.
            plan: the pack's attention plan (with the same parents) where the caller has made one.

        Returns:
            [tokens, hidden] in the model's dtype.

        Raises:
            ValueError: wrong number of dimensions.
        """
        if input_ids.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"input_ids and cu_seqlens: expected [tokens] and [documents + 1], got {list(input_ids.shape)} and "
                f"{list(cu_seqlens.shape)}; the model takes packs, not padded batches"
            )
        positions = document_positions(input_ids.shape[0], cu_seqlens, parents)
        return self.model(input_ids, positions, PackedAttend(cu_seqlens, plan, parents), self._next_dropout_seed())

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab], with the final soft cap where the architecture has one."""
        head = self.lm_head_weight
        trained = torch.is_grad_enabled() and head.requires_grad
        logits = F.linear(hidden, head) if trained else frozen_linear(hidden, [head])[0]
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.model.activation_checkpointing = enabled

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Within the block the model computes what the base model does, also while adapters are merged."""
        from .lora import base_model_only

        with base_model_only(self):
            yield

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[int | Sequence[int]] = (),
        batch_size: int = 64,
    ) -> list[list[int]]:
        """Continue each prompt with up to `max_new_tokens` tokens.

        Adapters act unless they are disabled; dropout is off. A prefix that prompts share is computed once: several
        answers to one prompt cost one. Sequences that end make room for waiting ones; only running ones are computed.
        Prompt i draws from its own stream of random numbers, a function of (seed, i): its result does not depend on its
        neighbours, up to rounding.

        Args:
            prompts: token ids, each at least one.
            max_new_tokens: at least 1.
            temperature: 0 is greedy (the most probable token, the first of equals).
            top_p: smallest set of most probable tokens with this mass, in (0, 1].
            top_k: only this many most probable tokens; 0 for all.
            seed: of the draws.
            stop: token ids, and sequences of ids, that end a sequence; not part of the result.
            batch_size: sequences computed at once.

        Returns:
            The new tokens of each prompt, without the stop.

        Raises:
            ValueError: an argument is out of range, or a prompt is empty, holds ids outside the vocabulary or would
                grow past the model's `max_position_embeddings`.
        """
        from .generate import generate

        return generate(
            self, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=seed, stop=stop, batch_size=batch_size,
        )  # fmt: skip

    def _next_dropout_seed(self) -> int | None:
        """A new seed for this forward pass; layers add small offsets to it, so seeds of two passes lie far apart."""
        if not self.training or self.lora_config is None or self.lora_config.dropout == 0.0:
            return None
        seed = (self.dropout_seed * 0x9E3779B97F4A7C15) & _SEED_MASK
        self.dropout_seed += 1
        return seed

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0 - module.weight_offset)
            elif isinstance(module, Linear | Embedding):
                module.weight.normal_(0.0, self.config.initializer_range)
                if isinstance(module, Linear) and module.bias is not None:
                    module.bias.zero_()


def _norm(config: ModelConfig, size: int) -> RMSNorm:
    return RMSNorm(size, eps=config.rms_norm_eps, weight_offset=config.norm_weight_offset)
