"""Everything that moves credits: typed Python over SQL.

PostgreSQL is the only truth about credits. One public function here is one transaction and one
business act; callers never commit. Nothing in this room knows about queues or HTTP.
"""
