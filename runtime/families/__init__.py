"""Models whose layers only Transformers computes: built from a Model document, measured layer by layer, and run."""
