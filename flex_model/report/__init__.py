"""What there is to know of a model's hooks before they run: layouts, traffic and memory."""
