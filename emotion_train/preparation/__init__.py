"""A source of posts becomes a prepared data set."""
