"""Rotary position embedding (RoPE: Su et al. 2021), half-split, with linear and Llama 3.1 scaling."""
