"""Mistral 7B and its successors, and Ministral 8B: Llama's layers with sliding windows."""

from tinsmith.model.families.family import Family

FAMILY = Family(
    title="Mistral",
    model_types=("mistral", "ministral"),
    norms=("MistralRMSNorm", "MinistralRMSNorm"),
    mlps=("MistralMLP", "MinistralMLP"),
    attentions=("MistralAttention", "MinistralAttention"),
)
