"""What does not run on FloralConfig, and why. An entry that no longer matches anything is an error."""

from __future__ import annotations


# Tests without a tuner among their arguments that are about ours all the same.
NOT_PARAMETRIZED = {
    "test_from_peft_type",  # every member of PeftType, FLORAL among them, leads to its config
}

# Pattern of a test's id -> why it is not run, on either tuner.
DESELECTED = {
    r"::test_from_pretrained_cache_dir\[": "downloads into an empty cache, and tests run offline",
    r"::test_base_model_module_named_like_peft_prefix\[": "looks the prefix up in its own dict of LoRA and LoKr",
    r"::test_default_target_modules_(str|list_of_str)\[": "patches PEFT's table; ours is a table of its own",
    r"::test_add_weighted_adapter_cat_with_rank_pattern\[": "FLORAL has no add_weighted_adapter: its router mixes",
}

# Pattern of the reason with which a test skips itself on FloralConfig -> why that is right.
SKIPPED = {
    r"^Test not applicable for <class .*FloralConfig": "weighted adapters (LoRA and IA3) and prompt learning only",
    r"^This test does not apply to <class .*FloralConfig": "prompt tuning only",
    r"^Skip tests that are not prompt learning$": "prompt learning only",
    r"^This test is only for prompt learning methods\.$": "prompt learning only",
    r"^Mixed adapter batches not supported for": "batches mix clients (`client_ids`), not adapters (`adapter_names`)",
    r"FloralConfig'> does not support the 'bias' argument": "adaptors have biases of their own (`adapt_bias`)",
    r"^This test requires the PEFT method to support training the bias directly": "the same",
    r"^Testing bias warnings only for LoraConfig or BOFTConfig$": "the same",
    r"^Multiple active adapters with modules_to_save": "PEFT allows no two active adapters here, whatever the tuner",
    r"^This PEFT method does not support Conv1D layers": "PEFT's list of those that do is closed",
    r"^Skip tests that use floralconfig for Deberta models$": "PEFT skips DeBERTa wherever a name has 'lora' in it",
    r"^Skip tests for (Llama|Gemma3) models because layers have no bias term$": (
        "meant for BEFT alone; 'tiny-without-biases' runs these tests on the same architecture under another name"
    ),
}
