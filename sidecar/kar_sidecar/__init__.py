"""The online half of KAR Sidecar: store, index, features, releases, ranking, the gRPC server and its launcher."""
