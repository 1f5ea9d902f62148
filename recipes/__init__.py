"""The papers as scripts, one each: `accelerate launch recipes/NAME.py --help`. presets/ has the data that one of them
comes with, accelerate/ the launch configurations.
"""
