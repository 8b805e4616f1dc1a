"""What every process agrees on: the event contract, prices, plans, errors, settings, names, tables.

This room does no I/O and imports no other room. `tables` needs SQLAlchemy and is read by the
ledger and the migrations only; everything else here is light enough for the SDK.
"""
