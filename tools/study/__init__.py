"""`make study`: the method's claims and their limits in miniature, with intervals over seeds and prompts (docs/study.md)."""
