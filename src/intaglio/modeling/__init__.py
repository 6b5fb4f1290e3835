"""Model families: anatomy, passes over parts of a model, target selection, module replacement."""
