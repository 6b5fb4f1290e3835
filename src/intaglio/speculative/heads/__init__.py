"""Draft heads: small modules trained on a frozen model that guess its next tokens, and the code they share.

The methods are `intaglio.methods.decoding.chimera` and `intaglio.methods.decoding.hidden_transfer`; their baseline is
`intaglio.speculative.drafters.medusa`. The shared code makes two of them differ only in the method:

- `own_text`: self-generated training data, kept in the user's cache
- `objective`: the objective that trains heads through the training loop while the model stays frozen; `train_heads`
- `losses`: losses over a vocabulary, a few rows at a time; `ahead`: the multi-token loss
- `vocabulary`: the frozen output head with a trained change: full matrices or a shared low-rank one
- `candidates`: candidate tokens for a static tree
- `method`: settings, `fit` and `restore` of a method with such heads
"""
