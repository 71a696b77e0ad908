"""The launcher: plans, checks, starts `accelerate launch`, lists and shows runs, pulls adapters.

It never imports torch.
"""
