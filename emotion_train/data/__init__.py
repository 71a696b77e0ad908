"""Posts on their way from a bucket to a training step."""
