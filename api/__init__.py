"""The HTTP side: pre-check gate and health endpoints, as FastAPI views over the ledger.

A route parses, makes one ledger call and answers. Errors come from `schema.errors` and are
rendered in one place.
"""
