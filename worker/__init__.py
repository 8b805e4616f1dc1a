"""The Celery side: an app, its thin tasks, the drain, and the streams it reads.

Celery messages are wake-up tokens without payload; the events themselves wait in Redis Streams
until the ledger has committed them.
"""
