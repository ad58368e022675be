"""A small HTTP server for one checkpoint: scores and samples, by vLLM's routes and a few of its own. Needs the extra
``serve``; importing the package itself loads nothing."""
