"""Adapters judged on posts outside of their runs."""
