"""Heads that draft: small modules trained on a frozen model that guess its next tokens; what all of them share.

The methods are elsewhere (`intaglio.methods.decoding.chimera`, `intaglio.methods.decoding.hidden_transfer`; their baseline is
`intaglio.speculative.drafters.medusa`). Here is what they do alike, so that two of them differ in the method alone:

- `own_text`: text that the model itself writes, kept in the user's cache: what heads are trained on
- `objective`: the objective that trains heads through the one loop while the model stays frozen; `train_heads`
- `losses`: losses over a vocabulary, a few rows at a time
- `vocabulary`: the frozen output head with a trained change: full matrices or a shared low-rank one
- `shape`: static sparse trees, and how candidates fill them
- `method`: the settings, `fit`, `restore` and `generate` of a method that owns such heads
"""
