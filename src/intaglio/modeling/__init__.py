"""Model families: anatomy, target selection, module replacement."""
