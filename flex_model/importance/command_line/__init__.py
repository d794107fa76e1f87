"""`flex-model score`: a scoring run from a config file, plain or under torchrun."""
