"""Ready ZeRO-3 configurations, found by name."""
