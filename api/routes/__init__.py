"""One module of routes per subject; each route is one ledger call."""
