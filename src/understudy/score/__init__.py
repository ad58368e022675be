"""`understudy score`: rollouts from a run, a file or another toolkit's dump, marked where marks are missing."""
