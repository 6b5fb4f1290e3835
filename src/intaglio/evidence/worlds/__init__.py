"""Worlds: models and data that experiments share, seeded, split and sealed.

- `smollm2`: SmolLM2-135M-Instruct with Wikipedia, for what is carved without training.
- `prompts`: beginnings and chat turns of five kinds for SmolLM2, for what generates.
- `instructions`: instruction pairs of four kinds for SmolLM2, for what chooses what is trained on.
- `smollm2_draft`: a two-layer draft model for it, trained on what it says itself, once and cached.
- `source_code`: bytes of Python source and a small Llama, new or trained once and cached.
- `two_tokenizers`: the same source read by two tokenizers, with a small Llama for each.
- `roles`: names in Python source with their roles, and a small Llama that was trained on such text.
- `haystack`: a synthetic language with facts hidden in filler and questions at the end.
- `board_game`: games on a small board whose state is known at every token, and a small GPT-2 that predicts them.
- `digits`: handwritten digits as images and as sequences, with wrong labels where asked for.
- `docstrings`: summaries of functions that search for code or text.
- `movielens`: what users watched in order of time, the last film held out.

What they share:

- `sealing`: sets by hash, draws by key.
- `made`: what is made once and found again in the user's cache; `trained`, models among it.

In all of them `training(seed)` follows from the seed alone, settings are chosen on `validation` (which is what the
stage `tuning` is measured on), and another seed base measures on other samples of a set that nothing was chosen on.
"""
