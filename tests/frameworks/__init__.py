"""Tiny models of each framework, whole and sharded, with the same values: the grid's rows."""
