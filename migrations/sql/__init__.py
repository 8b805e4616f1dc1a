"""The public SQL functions and views, one file each, as migrations load them."""

from pathlib import Path

FUNCTIONS = (
    "usage_fingerprint",
    "has_sufficient_credits",
    "deduct_credits",
    "add_credits_to_pool",
    "allocate_credits_to_user",
    "refuse_change",
)
VIEWS = (
    "org_billing_summary",
    "user_multi_org_credits",
)


def statement(name: str) -> str:
    """The SQL text of one file."""
    return (Path(__file__).parent / f"{name}.sql").read_text("utf-8")
