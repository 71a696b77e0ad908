"""Fine-tune a language model into an emotion classifier, streaming posts from a bucket and
reporting honest F1.
"""
