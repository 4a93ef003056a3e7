"""The offline half of KAR Sidecar: from raw logs to a published release."""
