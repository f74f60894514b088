"""Plain torch implementations: the oracle of every faster one, and the fallback."""
