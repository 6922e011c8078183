"""Sessions: one opened engine each, checked before it is opened."""
