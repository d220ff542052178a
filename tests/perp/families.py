"""Small models of many families, made from their configurations: the only place where families are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

from perp.blocks import find_blocks, prunable
from perp.linear import swap_linears

VOCABULARY = 96
HIDDEN = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "init_std": 0.15,
}
_SLIDING = {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, Callable[[], tuple[type, t.PretrainedConfig]]] = {
    "opt": lambda: (t.OPTForCausalLM, t.OPTConfig(**_OPT, word_embed_proj_dim=HIDDEN)),
    "opt-post-norm": lambda: (
        t.OPTForCausalLM,
        t.OPTConfig(**_OPT, word_embed_proj_dim=HIDDEN // 2, do_layer_norm_before=False),
    ),
    "llama": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**_COMMON)),
    "neox-parallel": lambda: (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**_COMMON, use_parallel_residual=True)),
    "neox-sequential": lambda: (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**_COMMON, use_parallel_residual=False)),
    "qwen2": lambda: (t.Qwen2ForCausalLM, t.Qwen2Config(**_COMMON)),
    "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**_COMMON, head_dim=8)),
    "gemma": lambda: (t.GemmaForCausalLM, t.GemmaConfig(**_COMMON, head_dim=8)),
    "gemma2": lambda: (t.Gemma2ForCausalLM, t.Gemma2Config(**{**_COMMON, **_SLIDING}, layer_types=_LAYER_TYPES)),
    "gemma3": lambda: (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig(**{**_COMMON, **_SLIDING}, layer_types=_LAYER_TYPES),
    ),
    "phi": lambda: (t.PhiForCausalLM, t.PhiConfig(**_COMMON)),
    "bloom": lambda: (
        t.BloomForCausalLM,
        t.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4, initializer_range=0.15),
    ),
    "mistral": lambda: (t.MistralForCausalLM, t.MistralConfig(**_COMMON, sliding_window=4)),
}

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Mixtures of experts, fused as the library fuses them: plain; with a shared expert and its gate; behind a dense block
# with compressed attention; with a router that is an nn.Linear; transposed with biases.
MIXTURES: dict[str, Callable[[], tuple[type, t.PretrainedConfig]]] = {
    "mixtral": lambda: (
        t.MixtralForCausalLM,
        t.MixtralConfig(**{**_COMMON, "intermediate_size": 24}, num_local_experts=3, sliding_window=None),
    ),
    "qwen2-moe": lambda: (
        t.Qwen2MoeForCausalLM,
        t.Qwen2MoeConfig(**_COMMON, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
    ),
    "deepseek": lambda: (
        t.DeepseekV3ForCausalLM,
        t.DeepseekV3Config(
            **{**_COMMON, **_EXPERTS, "num_key_value_heads": 4},
            n_routed_experts=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),
    "phimoe": lambda: (
        t.PhimoeForCausalLM,
        t.PhimoeConfig(**{**_COMMON, "intermediate_size": 24}, num_local_experts=4, sliding_window=None),
    ),
    "gpt-oss": lambda: (
        t.GptOssForCausalLM,
        t.GptOssConfig(
            **{**_COMMON, "intermediate_size": 24},
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            sliding_window=8,
        ),
    ),
}

_CHOOSERS = ("mlp.gate.", "router", "shared_expert_gate")


def chooses(name: str) -> bool:
    """Whether this weight of a mixture is a router's or a shared expert's gate's."""
    return any(part in name for part in _CHOOSERS)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of the family with random weights, norms and biases moved off their neutral values; in eval mode."""
    kind, config = {**FAMILIES, **MIXTURES}[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def seeing(vocabulary: int) -> nn.Module:
    """A language model with a vision tower, which transformers also loads as a language model; random weights."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = t.Gemma3TextConfig(**{**_COMMON, **_SLIDING, "vocab_size": vocabulary}, layer_types=_LAYER_TYPES)
    tower = t.SiglipVisionConfig(**size, image_size=16, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = t.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=5)
        return t.Gemma3ForConditionalGeneration(config).eval()


def undescribed() -> nn.Module:
    """A mixture whose fused experts transformers' interface does not describe, beside a router and a shared expert."""
    config = t.Llama4TextConfig(
        **{**_COMMON, "intermediate_size": 24},
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        attention_chunk_size=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return t.Llama4ForCausalLM(config).eval()


def windows(count: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids, int64 [count, length], special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def pruned(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = build(family, dtype=dtype, **changes)
    prefix, blocks = find_blocks(model)
    linears = {k: v for i, block in enumerate(blocks) for k, v in prunable(block, f"{prefix}.{i}").items()}
    generator = torch.Generator().manual_seed(0)
    swap_linears(model, {k: torch.rand(v.weight.shape, generator=generator) < 0.5 for k, v in linears.items()})
    return model


def full_loss(model: Any, ids: Tensor) -> Tensor:
    """The definition: mean cross-entropy of each token given those before it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
