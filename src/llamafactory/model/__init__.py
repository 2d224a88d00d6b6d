"""Models: what is loaded, how it is adapted, and what the hardware makes of it."""
