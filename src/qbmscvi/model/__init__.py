"""What users call: QBMSCVI, QBMSCANVI, and the methods that they share."""
