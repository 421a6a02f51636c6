"""Layer rules: from what a layer read and what flowed back to it, to its parameters' per-example gradients."""
