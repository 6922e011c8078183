"""A small VAE of TAESD's shape, trained from a full one."""
