"""The article's claims as experiments with controls: `understudy experiment <claim>`; experiments/README.md."""
