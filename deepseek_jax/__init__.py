"""Training system of DeepSeek-V3 in JAX."""
