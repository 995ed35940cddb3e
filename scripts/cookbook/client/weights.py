"""Trains a little, then downloads, merges and exports with tinker_cookbook.weights. Run inside `.venv-cookbook`.

`weights.py OUT MODEL_DIRECTORY MODEL_NAME`; the server is the one of TINKER_BASE_URL. For a training and an external
checkpoint the same text gets its log-probabilities from the service, from the merged model, from peft's adapter on the
base, and from the base with B @ A times the scale added to its weights by hand, here; they have to agree.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tinker import types
from tinker_cookbook import weights
from transformers import AutoModelForCausalLM

BOUND = 1e-4
RANK, STEPS, LEARNING_RATE = 8, 3, 1e-2
TEXT = "What is 3 + 4? The sum is 7. Then the cat walked home."
PREFIX = "base_model.model."


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def logprobs(model: Any, tokens: list[int]) -> np.ndarray:
    """Of each token after the first, [tokens - 1]."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def by_hand(base: Path, adapter: Path) -> Any:
    """The base with every delta added: W + (alpha / r) B @ A."""
    model, config = load(base), json.loads((adapter / "adapter_config.json").read_text())
    pairs, scale = load_file(adapter / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name in [name for name in pairs if name.endswith(".lora_A.weight")]:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            module = "lm_head" if module.endswith("unembed_tokens") else module
            delta = pairs[name.replace(".lora_A.", ".lora_B.")].float() @ pairs[name].float()
            model.get_submodule(module).weight += scale * delta
    return model


def main(out: Path, base: Path, name: str) -> int:
    service = tinker.ServiceClient()
    run = service.create_lora_training_client(name, rank=RANK, seed=1).result()
    tokens = run.get_tokenizer().encode(TEXT)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": np.array(tokens[1:])}
    )
    for _ in range(STEPS):
        run.forward_backward([datum], "cross_entropy").result()
        run.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
    served = np.array(run.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy())
    moved = float(np.abs(served - logprobs(load(base), tokens)).max())
    print(f"{len(tokens)} tokens, trained {STEPS} steps: log-probabilities moved by up to {moved:.3f}")
    worst = 0.0
    for kind in ("training", "external"):
        save = run.save_state if kind == "training" else run.save_weights_external
        adapter = Path(weights.download(tinker_path=save(kind).result().path, output_dir=str(out / kind)))
        merged, exported = out / f"{kind}-merged", out / f"{kind}-peft"
        for old in (merged, exported):
            shutil.rmtree(old, ignore_errors=True)
        weights.build_hf_model(
            base_model=str(base),
            adapter_path=str(adapter),
            output_path=str(merged),
            dtype="float32",
            merge_strategy="full",
        )
        weights.build_lora_adapter(base_model=str(base), adapter_path=str(adapter), output_path=str(exported))
        hand = logprobs(by_hand(base, adapter), tokens)
        found = {
            "merged model against base + B @ A": np.abs(logprobs(load(merged), tokens) - hand).max(),
            "peft adapter against base + B @ A": np.abs(
                logprobs(PeftModel.from_pretrained(load(base), exported), tokens) - hand
            ).max(),
            "service against base + B @ A": np.abs(served - hand).max(),
        }
        for what, error in found.items():
            print(f"{kind}: {what}: {error:.1e}")
        worst = max(worst, *(float(error) for error in found.values()))
    try:
        weights.download(tinker_path=run.save_weights_for_sampler("s").result().path, output_dir=str(out / "sampler"))
    except Exception as error:  # the cookbook's own rule, whatever its type
        print(f"sampler weights can't be downloaded, says the cookbook: {error}")
    else:
        print("sampler weights were downloaded, which the cookbook doesn't offer")
        return 1
    service.close("success").result()
    if worst > BOUND or moved < 0.1:
        print(f"weights differ: {worst:.1e} is beyond {BOUND:.0e}, or training moved nothing ({moved:.1e})")
        return 1
    print(f"weights agree within {BOUND:.0e}: worst {worst:.1e}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
