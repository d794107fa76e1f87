"""Making a model smaller or easier to quantize, in place, on the shards that each rank holds."""
