"""Shards and manifests of the isolation state, and what can be proved from them."""
