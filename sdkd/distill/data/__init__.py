"""What training reads: images and captions, latents and text embeddings, in which order."""
