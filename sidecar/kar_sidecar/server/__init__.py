"""Owns the gRPC server: its services, what happens around each call, its metrics endpoint, its health."""
