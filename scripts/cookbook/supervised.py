"""Recipes that learn from examples and preferences, and from a teacher."""

from __future__ import annotations

from scripts.cookbook.outcome import agreeing, both, falls, learned, resumed, said, trained
from scripts.cookbook.recipe import (
    LOG,
    MODEL,
    MODEL_IS,
    NLL,
    NO_THOUGHT,
    PLAIN,
    REWARD,
    STUDENT,
    TEACHER,
    Recipe,
    recipe,
)

SUPERVISED = (
    Recipe(
        "sl_loop",
        recipe("sl_loop"),
        (MODEL_IS, "batch_size=8", "max_steps=12", "max_length=256", "save_every=5", "learning_rate=1e-3", LOG[0]),
        resumed(falls(12, NLL, 3, 1.0), NLL, 2),
        kill_at=8,
    ),
    Recipe(
        "sl_basic",
        recipe("sl_basic"),
        (f"model_name={PLAIN}", "max_steps=2", LOG[0]),
        trained(2, NLL),
    ),
    Recipe(
        "chat_sl",
        recipe("chat_sl.train"),
        (MODEL_IS, "dataset=no_robots", "batch_size=16", "max_steps=16", "learning_rate=1e-3", "save_every=8", *LOG),
        falls(16, NLL, 4, 1.0),
    ),
    Recipe(
        "chat_sl tulu3",
        recipe("chat_sl.train"),
        (MODEL_IS, "dataset=tulu3", "batch_size=16", "max_steps=2", "eval_every=0", *LOG),
        trained(2, NLL),
    ),
    Recipe(
        "chat_sl resume",
        recipe("chat_sl.train"),
        (
            *(MODEL_IS, "dataset={work}/alike.jsonl", "batch_size=4", "max_steps=16", "lr_schedule=constant"),
            *("learning_rate=1e-3", "save_every=0", "rolling_save_every=6", "rolling_ttl_seconds=3600", *LOG),
        ),
        resumed(falls(16, NLL, 3, 1.0), NLL, 2),
        kill_at=11,
        again=("behavior_if_log_dir_exists=resume",),
    ),
    Recipe(
        "chat_sl sweep",
        recipe("chat_sl.sweep"),
        (
            *("recipe=sft", f"base.{MODEL_IS}", "base.dataset=no_robots", "base.batch_size=16", "base.eval_every=1"),
            *("training_budget_examples=32", "learning_rates=[1e-4,1e-3]", "lora_ranks=[4]"),
            f"sweep_dir={{log}}/{MODEL.replace('/', '-')}",
        ),
        said("Best config per rank", "Recommendations written to"),
    ),
    Recipe(
        "chat_sl sweep analyze",
        recipe("chat_sl.sweep.analyze"),
        ("--local-dir={runs}/chat_sl_sweep", "--output-dir={log}", "--no-plots"),
        said("models:"),
        after="chat_sl sweep",
    ),
    Recipe(
        "prompt_distillation create_data",
        recipe("prompt_distillation.create_data"),
        ("output_file={log}/lang.jsonl",),
        said("Saved data to"),
    ),
    Recipe(
        "prompt_distillation",
        recipe("prompt_distillation.train"),
        (MODEL_IS, "file_path={work}/alike.jsonl", "batch_size=8", "max_steps=2", "max_length=512", *LOG),
        trained(2, NLL),
    ),
    Recipe(
        "distillation off_policy",
        recipe("distillation.off_policy_reasoning"),
        (
            *(MODEL_IS, "batch_size=4", "max_steps=2", "max_length=512", "buffer_size=16", "max_prompts=32"),
            *("eval_every=0", *LOG),
        ),
        trained(2, NLL),
    ),
    Recipe(
        "decisions forecasting",
        recipe("decisions.forecasting"),
        (MODEL_IS, "data_path={work}/forecasts.csv", "batch_size=4", "max_steps=2", *LOG),
        trained(2, "train/loss"),
    ),
)

PREFERENCES = (
    *(
        Recipe(
            f"dpo {dataset}",
            recipe("preference.dpo.train"),
            (MODEL_IS, f"dataset={dataset}", "batch_size=4", "max_steps=2", "max_length=512", *LOG),
            trained(2, "dpo_loss"),
        )
        for dataset in ("hhh", "helpsteer3", "ultrafeedback")
    ),
    Recipe(
        "shorter",
        recipe("preference.shorter.train"),
        (MODEL_IS, NO_THOUGHT, "batch_size=2", "group_size=2", "max_tokens=16", "eval_every=0", "max_steps=2", *LOG),
        agreeing(trained(2, REWARD)),
    ),
    Recipe(
        "rlhf_pipeline",
        recipe("preference.rlhf.rlhf_pipeline"),
        (
            *(f"base_model={MODEL}", "short_name=tiny", "batch_size=4", "max_length=512", "max_steps=2"),
            *("rl_max_tokens=8", "rl_group_size=2", "eval_every=2", "save_every=2"),
        ),
        both(
            trained(2, NLL, ("../rlhf-tiny/sft", "../rlhf-tiny/rm")),
            agreeing(trained(2, REWARD, ("../rlhf-tiny/rl",)), "../rlhf-tiny/rl"),
        ),
        timeout_s=600,
    ),
)


DISTILLATION = (
    Recipe(
        "distillation on_policy",
        recipe("distillation.on_policy_distillation"),
        (
            *(MODEL_IS, f"teacher_model={TEACHER}", "groups_per_batch=2", "group_size=2", "max_tokens=16"),
            *("max_steps=2", "compute_post_kl=True", "lora_rank=16", *LOG),
        ),
        agreeing(trained(2, "teacher_kl")),
    ),
    Recipe(
        "distillation multi_teacher",
        recipe("distillation.on_policy_multi_teacher"),
        (
            *(MODEL_IS, f"deepmath_teacher_model={TEACHER}", f"tulu3_teacher_model={STUDENT}", "max_tokens=16"),
            *("deepmath_groups_per_batch=2", "tulu3_groups_per_batch=2", "group_size=2", "max_steps=2", "lora_rank=16"),
            *LOG,
        ),
        agreeing(trained(2, "teacher_kl")),
    ),
    *(
        Recipe(
            f"sdft {name}",
            recipe("sdft.train"),
            (MODEL_IS, *args, "groups_per_batch=4", "max_tokens=8", "max_steps=2", "eval_every=0", *LOG),
            trained(2, "sdft/num_datums"),
        )
        for name, args in (
            ("forward", ("dataset=sciknoweval",)),
            ("reverse", ("dataset=sciknoweval", "reverse=True")),
            ("toolalpaca", ("dataset=toolalpaca", "teacher_sync_every=1")),
        )
    ),
    Recipe(
        "sdft benchmark",
        recipe("sdft.benchmark"),
        (
            *(
                f"model_name={STUDENT}",
                "dataset=science",
                "data_dir={work}/arrow",
                "log_root={log}",
                "lora_rank=16",
                "max_tokens=16",
            ),
            *("groups_per_batch=4", "max_steps=1", "sft_batch_size=4", "sft_max_steps=1", "eval_every=0"),
            "behavior_if_log_dir_exists=delete",
        ),
        both(said("Saved summary to"), learned(2)),
    ),
    Recipe(
        "sdft run_continual_learning",
        recipe("sdft.run_continual_learning"),
        (
            *(MODEL_IS, "data_dir={work}/arrow", "log_root={log}", "lora_rank=16", "batch_size=4", "max_tokens=256"),
            *("methods=sft,sdft_topk", "learning_rates=1e-3"),
        ),
        both(said("EXPERIMENT COMPLETE"), learned(4)),
    ),
)
