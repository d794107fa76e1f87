"""What pruning by each importance hook costs the small trained Llama, beside chance and weights."""
