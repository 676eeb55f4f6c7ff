"""Language encoders."""
