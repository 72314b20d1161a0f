"""Graders of verifiable answers, a file each: what they read in a response, and when it is right."""
