"""A recipe as a whole: its stages in order, how far each is, and `run`, which does what is left."""
