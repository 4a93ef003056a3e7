"""The hybrid-expert adaptor operator."""
