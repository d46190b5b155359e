"""The models QBMSCVI and QBMSCANVI, and their common methods."""
