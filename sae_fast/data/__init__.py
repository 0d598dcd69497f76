"""The data that SAEs are trained on: text, the places of a transformer, activations harvested there and kept on disk."""
