"""The gate that an exported graph passes."""
