"""A small random configuration of each family, with all of its features switched on.

Windows are shorter than the sequences of the battery, caps are low enough to bend, ropes are scaled as they come.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.families.tiles import TilesProcessor

VOCAB = 211
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LATE_WINDOWS = {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}  # from the second layer on
SCALED_YARN = {  # queries grow with the position
    **YARN, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 10_000.0}
ONE_OF_TWO = ["sliding_attention", "full_attention"]
GEMMA3_ROPE = {  # as the models of 4 billion parameters and more
    "sliding_attention": THETA, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}  # fmt: skip
AXES_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
IMAGE = 207  # the placeholder of models with vision
QWEN_TOWER: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
    "initializer_range": 0.1,
}  # fmt: skip
QWEN_MARKS = {
    "image_token_id": IMAGE, "video_token_id": 208, "vision_start_token_id": 209, "vision_end_token_id": 210,
}  # fmt: skip

# what people call them
TITLES = {
    "llama": "Llama 3.x", "qwen2": "Qwen2.5", "qwen2_windows": "Qwen2.5 (windows)",
    "qwen3": "Qwen3", "qwen3_windows": "Qwen3 (windows)", "mistral": "Mistral", "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "gemma2": "Gemma 2", "gemma3": "Gemma 3 (text)", "phi3": "Phi-3, Phi-4",
    "phi4_mini": "Phi-4-mini, Phi-3.5-mini", "phi4_mini_long": "Phi-4-mini, Phi-3.5-mini (long)",
    "olmo": "OLMo 1", "olmo2": "OLMo 2", "olmo3": "OLMo 3",
    "smollm3": "SmolLM3", "glm": "GLM-4-9B-chat", "glm4": "GLM-4", "qwen3_moe": "Qwen3-MoE", "mixtral": "Mixtral",
    "glm4_moe": "GLM-4.5",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "gpt_oss": "gpt-oss", "deepseek_v3": "DeepSeek-V3", "moonlight": "Moonlight", "kimi_k2": "Kimi-K2",
    "llama4": "Llama 4 (text)", "llama4_vl": "Llama 4",
    "qwen3_vl": "Qwen3-VL", "gemma3_vl": "Gemma 3", "qwen3_vl_moe": "Qwen3-VL-MoE",
    "qwen3_next": "Qwen3-Next", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen2_moe": "Qwen2-MoE", "olmoe": "OLMoE", "granite": "Granite 3", "cohere2": "Cohere2",
    "minimax_m2": "MiniMax-M2", "exaone4": "EXAONE 4", "seed_oss": "Seed-OSS", "ernie4_5": "ERNIE 4.5",
}  # fmt: skip

KIMI_K2: dict[str, Any] = {
    **COMMON, "num_key_value_heads": 4, "q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip
KIMI_K2_ROPE = {
    "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# queries straight from the hidden states; values wider than keys, where the other two have narrower ones
MOONLIGHT: dict[str, Any] = {
    **KIMI_K2, "q_lora_rank": None, "v_head_dim": 28, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5,
}  # fmt: skip

MINIMAX_M2: dict[str, Any] = {
    **COMMON, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
PHI4_MINI: dict[str, Any] = {
    **COMMON, "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "sliding_window": 262_144,
    "original_max_position_embeddings": 256,
}  # fmt: skip
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.25, 1.4, 1.7, 2.0], "long_factor": [1.0, 1.5, 2.5, 6.0, 17.0, 40.0],
}  # fmt: skip
# the longest sequence where it is less than a configuration says: with phi4_mini's, short factors hold for all. In
# phi4_mini_long the long ones do, and in transformers too: no sequence of the battery is as short as its first length
CONTEXTS = {"phi4_mini": 256}

# two of three layers keep a state
QWEN_NEXT: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
QWEN_NEXT["initializer_range"] = 0.04  # with 0.1, transformers in float32 is up to 1.4e-5 from itself in float64
# An outcome of the delta rule is 1e-2 here, and where a sequence's first query and key are nearly at right angles 1e-4
# of either sign. Brought to length one with an epsilon of 1e-6, that is as good as a jump: rounding one projection to
# float32 in a float64 model moves gradients by 4e-6. The rule and its norm at 1e-6 are in test_states.py.
QWEN_NEXT["rms_norm_eps"] = 1e-4
QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40,
}  # fmt: skip
HALF_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
MROPE = {**HALF_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}

CONFIGS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**COMMON, rope_parameters=YARN, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)),
    "qwen2_windows": (Qwen2ForCausalLM, Qwen2Config(**COMMON, **LATE_WINDOWS, rope_parameters=YARN)),
    "qwen3_windows": (Qwen3ForCausalLM, Qwen3Config(**COMMON, **LATE_WINDOWS, head_dim=16)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **COMMON, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True,
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**COMMON, num_local_experts=6, num_experts_per_tok=2, sliding_window=15),
    ),
    "glm4_moe": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **COMMON, head_dim=16, partial_rotary_factor=0.5, use_qk_norm=True, attention_bias=True, n_routed_experts=8,
            n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=48, n_group=4, topk_group=2,
            first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=1.7,
        ),
    ),
    "glm4_moe_lite": (
        Glm4MoeLiteForCausalLM,
        Glm4MoeLiteConfig(
            **{**COMMON, "num_key_value_heads": 4}, q_lora_rank=40, kv_lora_rank=24, qk_nope_head_dim=16,
            qk_rope_head_dim=8, v_head_dim=20, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
            moe_intermediate_size=48, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=1.8,
            mlp_layer_types=["dense", "sparse"],
        ),
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **COMMON, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=14, swiglu_limit=0.7,
            layer_types=ONE_OF_TWO, rope_parameters=YARN,
        ),
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **{**COMMON, "num_key_value_heads": 4}, q_lora_rank=40, kv_lora_rank=24, qk_nope_head_dim=16,
            qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
            moe_intermediate_size=48, n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.7,
            rope_parameters=YARN,
        ),
    ),
    "moonlight": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **MOONLIGHT, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, num_nextn_predict_layers=0,
        ),
    ),
    "kimi_k2": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **KIMI_K2, rope_parameters={**KIMI_K2_ROPE, "rope_type": "yarn", "rope_theta": 50_000.0},
            num_nextn_predict_layers=0,
        ),
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **{**COMMON, "num_hidden_layers": 4}, head_dim=16, intermediate_size_mlp=80, num_local_experts=6,
            num_experts_per_tok=1, interleave_moe_layer_step=2, use_qk_norm=True, attention_chunk_size=24,
            attn_temperature_tuning=True, floor_scale=16, attn_scale=0.3, rope_parameters=LLAMA3_ROPE,
        ),
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig(**QWEN_NEXT, **QWEN_EXPERTS, mlp_only_layers=[1], rope_parameters=HALF_ROPE),
    ),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**QWEN_NEXT, rope_parameters=MROPE, tie_word_embeddings=True)),
    "qwen3_5_moe": (Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**QWEN_NEXT, **QWEN_EXPERTS, rope_parameters=MROPE)),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**COMMON, **QWEN_EXPERTS, mlp_only_layers=[1])),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**COMMON, num_experts=8, num_experts_per_tok=3)),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig(
            **COMMON, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.3, attention_multiplier=0.2,
        ),
    ),
    "cohere2": (
        Cohere2ForCausalLM,
        Cohere2Config(**COMMON, sliding_window=12, logit_scale=0.4, layer_types=ONE_OF_TWO),
    ),
    "minimax_m2": (
        MiniMaxM2ForCausalLM,
        MiniMaxM2Config(**MINIMAX_M2, rope_parameters=THETA),
    ),
    "exaone4": (
        Exaone4ForCausalLM,
        Exaone4Config(
            **COMMON, head_dim=16, sliding_window=12, layer_types=ONE_OF_TWO, rope_parameters=LLAMA3_ROPE,
        ),
    ),
    "seed_oss": (
        SeedOssForCausalLM,
        SeedOssConfig(**COMMON, head_dim=24, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    ),
    "ernie4_5": (
        Ernie4_5ForCausalLM, Ernie4_5Config(**COMMON, head_dim=16, use_bias=True, tie_word_embeddings=True),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**COMMON, sliding_window=13)),
    "ministral": (
        MinistralForCausalLM,
        MinistralConfig(**COMMON, head_dim=24, sliding_window=9, layer_types=ONE_OF_TWO),
    ),
    "ministral3": (
        Ministral3ForCausalLM,
        Ministral3Config(**COMMON, head_dim=16, rope_parameters=SCALED_YARN),
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **COMMON, head_dim=16, query_pre_attn_scalar=24, sliding_window=11, layer_types=ONE_OF_TWO,
            attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **COMMON, head_dim=16, query_pre_attn_scalar=24, sliding_window=11, layer_types=ONE_OF_TWO,
            rope_parameters=GEMMA3_ROPE,
        ),
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config(**COMMON, sliding_window=17)),
    "phi4_mini": (
        Phi3ForCausalLM, Phi3Config(**PHI4_MINI, rope_parameters={**LONGROPE, "rope_type": "longrope"}),
    ),
    "phi4_mini_long": (
        Phi3ForCausalLM,
        Phi3Config(
            **{**PHI4_MINI, "original_max_position_embeddings": 4},
            rope_parameters={**LONGROPE, "rope_type": "longrope"},
        ),
    ),
    "olmo": (OlmoForCausalLM, OlmoConfig(**COMMON, clip_qkv=0.2)),  # reached by most of the projections
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**COMMON)),
    "olmo3": (
        Olmo3ForCausalLM,
        Olmo3Config(
            **COMMON, sliding_window=12, layer_types=ONE_OF_TWO,
            rope_parameters={"sliding_attention": THETA, "full_attention": {**YARN, "attention_factor": 1.2}},
        ),
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**COMMON, no_rope_layers=[1, 0])),
    "glm": (GlmForCausalLM, GlmConfig(**COMMON, head_dim=16, partial_rotary_factor=0.5, attention_bias=True)),
    "glm4": (Glm4ForCausalLM, Glm4Config(**COMMON, head_dim=16, partial_rotary_factor=0.5)),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig(
            text_config={**COMMON, "head_dim": 16, "rope_parameters": AXES_ROPE},
            vision_config=QWEN_TOWER, tie_word_embeddings=True, **QWEN_MARKS,
        ),
    ),
    "qwen3_vl_moe": (
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLMoeConfig(
            text_config={
                **COMMON, "head_dim": 16, "rope_parameters": AXES_ROPE, "num_experts": 8, "num_experts_per_tok": 3,
                "moe_intermediate_size": 48, "mlp_only_layers": [1],
            },
            vision_config=QWEN_TOWER, **QWEN_MARKS,
        ),
    ),
    "llama4_vl": (
        Llama4ForConditionalGeneration,
        Llama4Config(
            text_config={
                **COMMON, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size_mlp": 80, "num_local_experts": 6,
                "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "use_qk_norm": True,
                "attention_chunk_size": 24, "attn_temperature_tuning": True, "floor_scale": 16, "attn_scale": 0.3,
                "rope_parameters": LLAMA3_ROPE,
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "vision_output_dim": 48, "projector_input_dim": 48,
                "projector_output_dim": 48, "initializer_range": 0.1,
            },
            image_token_index=IMAGE, boi_token_index=205, eoi_token_index=206, initializer_range=0.1,
        ),
    ),
    "gemma3_vl": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(
            text_config={
                **COMMON, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 11, "layer_types": ONE_OF_TWO,
                "rope_parameters": GEMMA3_ROPE,
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 32, "patch_size": 4,
            },
            mm_tokens_per_image=16, image_token_id=IMAGE, boi_token_id=209, eoi_token_id=210, initializer_range=0.1,
        ),
    ),
}  # fmt: skip

QWEN_PROCESSOR = Qwen2VLImageProcessorPil(
    patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
)

# of those with vision: the image processor of their directory
PROCESSORS: dict[str, Any] = {
    "qwen3_vl": QWEN_PROCESSOR,
    "qwen3_vl_moe": QWEN_PROCESSOR,
    "gemma3_vl": Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
    "llama4_vl": TilesProcessor(),
}
