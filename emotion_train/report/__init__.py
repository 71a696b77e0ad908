"""The F1 report: its numbers, plots and pages."""
