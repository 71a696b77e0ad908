"""Hosted models behind OpenAI-compatible endpoints: asked, paid, counted."""
