"""Recipes that run the plugin."""
