"""Publishing, model cards, conversion, export."""
