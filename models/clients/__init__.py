"""Clients of the example models: plain gRPC with this project's own messages."""
