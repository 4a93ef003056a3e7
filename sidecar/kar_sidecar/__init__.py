"""The online half of KAR Sidecar: store, index, scoring and the gRPC server."""
