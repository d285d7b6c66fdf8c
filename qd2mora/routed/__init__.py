"""What a routed adapter computes, in files that import torch and each other alone, never this package's other parts.

An exact export carries copies of them, beside `modeling_mixture`, which puts them into transformers' LLaMA: the model
that was trained and the model that leaves the house run the same lines. So their imports of each other are relative.
"""
