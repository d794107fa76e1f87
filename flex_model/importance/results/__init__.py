"""What a scoring run shows in the end: a table, a picture, a page, and one vector per score."""
