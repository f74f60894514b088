"""The demonstration, and the small model that it trains."""
