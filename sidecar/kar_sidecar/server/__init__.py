"""Owns the gRPC server process, its services and its interceptor."""
