"""Networks that learn from pixels: published ones, fine-tuned backbones, and what trains and keeps them."""
