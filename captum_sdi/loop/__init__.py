"""What repeats in a model, and which parameters count."""
