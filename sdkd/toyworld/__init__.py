"""The demo's drawn world, and who reads its images."""
