"""The HTTP side: gate, ingest, org-billing API and operations, as FastAPI views over the ledger.

A route parses, makes one ledger call and answers. Errors come from `schema.errors` and are
rendered in one place.
"""
