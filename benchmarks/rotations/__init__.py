"""What rotating online costs, over ranks too, and what it saves when a model is rounded."""
