"""The rate calculus: which powers of t a network's activations and gradients carry."""
