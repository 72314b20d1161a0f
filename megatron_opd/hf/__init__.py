"""Model directories as Hugging Face publishes them: config.json, tokenizer, stop ids and chat template, fingerprints, lineage."""
