"""The launcher: plans, checks, starts `accelerate launch`, lists and shows runs, pulls adapters. Never
imports torch.
"""
