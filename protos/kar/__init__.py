"""KAR contracts: protobuf messages and gRPC services."""
