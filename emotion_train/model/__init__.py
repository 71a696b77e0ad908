"""The base model, its adapter and its classification head."""
