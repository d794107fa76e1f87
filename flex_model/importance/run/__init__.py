"""The scoring run: many hooks in one pass, with checkpoints that survive a kill at any moment."""
