"""Objectives: what a student is trained on. Each draws its randomness in one place and is pure after that."""
