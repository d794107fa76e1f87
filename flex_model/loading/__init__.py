"""Models from disk, as commands load them: whole, or each rank's part."""
