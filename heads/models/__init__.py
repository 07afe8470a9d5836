"""Models: heads on features, solved heads, networks from pixels, fine-tuned backbones, and their catalogue."""
