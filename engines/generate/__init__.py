"""`sdkd generate`."""
