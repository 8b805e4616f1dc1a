"""What operators run: the `metering` command and the stack it starts.

Embedded servers, replay of usage files, queue status, reconciliation and the demonstration live
here. This room may import every other one, and none imports it.
"""
