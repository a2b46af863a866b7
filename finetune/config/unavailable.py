"""What other tools or the papers offer and this version does not: named, so that nobody hunts for the spelling."""

from __future__ import annotations

VALUES: dict[str, frozenset[str]] = {
    "quantization.method": frozenset(
        {"gptq", "awq", "hqq", "aqlm", "eetq", "int4", "int2", "nf2", "nf3", "fp8", "mxfp4", "nvfp4", "torchao"}
    ),
    "tuning.method": frozenset(
        {"adalora", "vera", "ia3", "prefix", "prefix-tuning", "prompt", "prompt-tuning", "p-tuning", "bitfit", "houlsby", "pfeiffer"}
        | {"adapter-fusion", "tied-lora", "galore", "loha", "lokr", "oft", "boft", "freeze", "badam", "lisa", "reft", "norms", "spectrum"}
    ),
    "tuning.init.method": frozenset({"pissa", "olora", "eva", "corda", "lora-ga"}),
    "tuning.targets": frozenset({"spectrum"}),
    "tuning.embeddings": frozenset({"new-tokens"}),
    "optimizer.method": frozenset(
        {
            "sgd",
            "adafactor",
            "lion",
            "lion-8bit",
            "adagrad",
            "muon",
            "sophia",
            "shampoo",
            "lamb",
            "galore",
            "apollo",
            "schedule-free",
            "rmsprop",
        }
    ),
    "schedule.method": frozenset({"polynomial", "inverse-sqrt", "cosine-with-restarts", "wsd", "rex"}),
    "data.train.0.format": frozenset({"preference", "dpo", "tool", "image", "multimodal"}),
    "data.overlong": frozenset({"split"}),
    "train.precision": frozenset({"fp16", "float16", "half", "fp8", "16", "pure-bf16"}),
    "quantization.compute_dtype": frozenset({"fp16", "float16", "fp8"}),
    "evaluation.tasks.0.task": frozenset({"generation", "choices", "harness", "lm-eval", "mmlu", "perplexity"}),
    "distributed.strategy": frozenset({"fsdp", "fsdp2", "deepspeed", "zero", "zero2", "zero3", "tensor-parallel", "pipeline"}),
}
"""Path -> values that mean something elsewhere."""

KEYS: frozenset[str] = frozenset(
    {
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "galore",
        "use_galore",
        "use_llama_pro",
        "freeze_trainable_layers",
        "spectrum",
        "packing",
        "sample_packing",
    }
    | {
        "pad_to_sequence_len",
        "neftune_noise_alpha",
        "flash_attention",
        "flash_attn",
        "attn_implementation",
        "torch_compile",
        "use_liger_kernel",
    }
    | {
        "trust_remote_code",
        "push_to_hub",
        "hub_model_id",
        "mlflow",
        "trackio",
        "comet",
        "special_tokens",
        "tokens",
        "added_tokens",
        "new_tokens",
    }
    | {
        "chat_template",
        "layers_to_transform",
        "lora_layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "use_qalora",
    }
    | {"rl", "dpo", "resize_token_embeddings", "resize_vocab", "group_by_length", "streaming", "multipack_real_batches", "plugins", "tf32"}
)
"""Keys that mean something elsewhere."""

REASONS: dict[str, str] = {
    "packing": "padding is already minimal: examples of a step are sorted and cut by tokens (train.tokens_per_device)",
    "sample_packing": "padding is already minimal: examples of a step are sorted and cut by tokens (train.tokens_per_device)",
    "group_by_length": "examples of a step are always sorted by length; the gradient does not depend on it",
    "trust_remote_code": "models that bring their own code are not run; use one that transformers knows",
    "deepspeed": "distributed.strategy is `auto` or `ddp`",
    "fsdp": "distributed.strategy is `auto` or `ddp`",
    "fsdp_config": "distributed.strategy is `auto` or `ddp`",
    "mlflow": "tracking knows `tensorboard` and `wandb`; metrics.jsonl is always written",
    "trackio": "tracking knows `tensorboard` and `wandb`; metrics.jsonl is always written",
    "comet": "tracking knows `tensorboard` and `wandb`; metrics.jsonl is always written",
    "streaming": "data is prepared before the first step, so that the order of a run can be repeated",
    "chat_template": "the tokenizer's own template is used",
    "push_to_hub": "`finetune merge` writes a directory; upload it with `hf upload`",
    "hub_model_id": "`finetune merge` writes a directory; upload it with `hf upload`",
}
"""What to do instead."""
