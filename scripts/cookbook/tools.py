"""Recipes that only sample, the cookbook's scripts, and its library for weights."""

from __future__ import annotations

from scripts.cookbook.outcome import said
from scripts.cookbook.recipe import MODEL, OWN, SCRIPTS_PACKAGE, Recipe, recipe

SAMPLING = (
    Recipe(
        "decisions demo",
        recipe("decisions.demo"),
        (f"--model_name={MODEL}",),
        said('"billing"', '"cookbook"'),
        stdin="Why was I charged twice?\n\n",
    ),
    Recipe(
        "true_thinking_score",
        recipe("true_thinking_score.run_small_experiment"),
        (),
        said("Total problems: 3", never=("Failed on problem",)),
        timeout_s=600,
    ),
    Recipe(
        "true_thinking_score analyze",
        recipe("true_thinking_score.analyze"),
        ("dataset=gsm8k", "n_problems=2", "max_tokens=64", "log_path={log}"),
        said(never=("Traceback",)),
    ),
)

WEIGHTS = (
    Recipe("weights", OWN / "weights.py", ("{log}", "{log}/base", MODEL), said("weights agree")),
    Recipe(
        "scripts merge_tinker_adapter",
        f"{SCRIPTS_PACKAGE}.merge_tinker_adapter_to_hf_model",
        ("--tinker-adapter-path={adapter}", "--hf-model={runs}/weights/base", "--output-path={log}/merged"),
        said(never=("Traceback",)),
        after="weights",
    ),
    Recipe(
        "scripts copy_checkpoint",
        f"{SCRIPTS_PACKAGE}.copy_checkpoint",
        ("--source-path={state}", "--output-kind=training"),
        said("training_path: tinker://"),
        after="chat_sl",
    ),
    Recipe(
        "scripts save_audit_log",
        f"{SCRIPTS_PACKAGE}.save_audit_log",
        ("--once", "--backfill-days=1", "--output-dir={log}"),
        said("Wrote"),
    ),
    Recipe(
        "scripts test_tool_calling_e2e",
        f"{SCRIPTS_PACKAGE}.test_tool_calling_e2e",
        (f"--model={MODEL}",),
        said("Passed:", never=("Error -",)),
    ),
)
