"""A run as it goes on: what is known of it, how it looks in a terminal, and how another shell follows it."""
