"""Invented worlds: small tasks with exact graders, and the recipes of the tiny models that live in them."""
