"""The small tour: column addition with worked steps, a shipped teacher, and a student trained from random weights."""
