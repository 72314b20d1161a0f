"""What can be said in a recipe, from the descriptions of its fields: `recipe explain`, and docs/recipe-reference.md."""
