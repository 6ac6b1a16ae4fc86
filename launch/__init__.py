"""Configuration, placement and the training loop: the only package that sees all the others."""
