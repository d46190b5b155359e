"""Networks: encoder, decoder and the loss, for scvi-tools."""
