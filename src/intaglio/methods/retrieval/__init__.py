"""Methods by area: text encoders and retrieval components."""
