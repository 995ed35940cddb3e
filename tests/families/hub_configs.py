"""config.json of families whose directories on the hub have another than transformers writes."""

from __future__ import annotations

from typing import Any

from tests.families.configs import KIMI_K2, KIMI_K2_ROPE, LONGROPE, MINIMAX_M2, MOONLIGHT, PHI4_MINI

HUB_DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "rope_theta": 50_000.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "seq_aux": True,
    "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "use_cache": True, "torch_dtype": "float32",
    "transformers_version": "4.48.3",
}  # fmt: skip
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "kimi_k2": {
        **KIMI_K2, **HUB_DEEPSEEK, "model_type": "kimi_k2", "rope_scaling": {**KIMI_K2_ROPE, "type": "yarn"},
    },
    "moonlight": {**MOONLIGHT, **HUB_DEEPSEEK, "model_type": "deepseek_v3"},
    "minimax_m2": {
        **MINIMAX_M2, "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "rope_theta": 10_000.0,
        "auto_map": {
            "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
            "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
        },
        "attn_type_list": [1, 1], "hidden_act": "silu", "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6,
        "scoring_func": "sigmoid", "shared_intermediate_size": 0, "tie_word_embeddings": False, "use_cache": True,
        "use_qk_norm": True, "use_routing_bias": True, "torch_dtype": "float32", "transformers_version": "4.46.1",
    },
    "phi4_mini": {
        **PHI4_MINI, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_theta": 10_000.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            "AutoTokenizer": "Xenova/gpt-4o",
        },
        "rope_scaling": {**LONGROPE, "type": "longrope"}, "attention_bias": False, "attention_dropout": 0.0,
        "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu", "interpolate_factor": 1, "lm_head_bias": False,
        "mlp_bias": False, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
        "transformers_version": "4.45.0", "use_cache": True,
    },
}  # fmt: skip
