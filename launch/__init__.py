"""The launcher: checks, starts `accelerate launch`, lists runs and pulls adapters. Never imports
torch.
"""
