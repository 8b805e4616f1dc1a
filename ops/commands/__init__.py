"""One module per command of `metering`: parse, call, print."""
