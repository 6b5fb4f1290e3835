"""Draft heads: small modules trained on a frozen model that guess its next tokens, and the code they share.

The methods are `intaglio.methods.decoding.chimera` and `intaglio.methods.decoding.hidden_transfer`; their baseline is
`intaglio.speculative.drafters.medusa`. The shared code makes two of them differ only in the method:

- `self_generated_data`: self-generated training data, kept in the user's cache
- `objective`: the objective that trains heads through the training loop while the model stays frozen; `train_heads`
- `chunked_loss`: losses over a vocabulary, a few rows at a time; `multi_token_loss`: the multi-token loss
- `lm_head`: the frozen output head with a trained change: full matrices or a shared low-rank one
- `candidates`: candidate tokens for a static tree
- `base`: settings, `fit` and `restore` of a method with such heads
"""
