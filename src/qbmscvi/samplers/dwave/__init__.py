"""D-Wave's annealers: jobs, embeddings, programs."""
