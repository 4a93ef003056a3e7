"""Owns `kar serve`: Triton and the gRPC sidecar as one supervised process tree on one machine."""
