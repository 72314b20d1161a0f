"""The recipe: its sections, its files, its paths, and as each round sees it. The recipes that ship are in megatron_opd/recipes/."""
