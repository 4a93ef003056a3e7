"""Owns the replay of test users through a running sidecar: quality of both arms, parity with offline scores, speed."""
