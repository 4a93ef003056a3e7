"""Owns the quality study: what each arm gives each model, how sure that is, and for which users and items."""
