"""The static table of methods: everything `intaglio list` says, readable without torch.

One entry a slug. A test checks each against the class it names, so the table cannot drift from the code. Adding a
method means adding its file and its line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "carving",
    "objective",
    "modifier",
    "selector",
    "decoder",
    "drafter",
    "visibility",
    "encoder",
    "dictionary",
    "probe",
    "study",
]

ROOMS: dict[str, str] = {
    "objectives": "masks over tokens: what the model must predict",
    "attention": "masks over attention: who sees whom",
    "weights": "masks over weights: which parameters live",
    "activations": "masks over units: which units fire",
    "decoding": "masks over next tokens: what may be said",
    "training": "masks over examples and gradients",
    "retrieval": "encoders, the index, search",
    "probes": "reading a model",
}


@dataclass(frozen=True)
class Entry:
    """One method as the catalogue shows it.

    Args:
        slug: the name used in recipes, on the command line and as the file's name.
        room: the subpackage it lives in, a key of `ROOMS`.
        name: the class's name, as people write the method.
        kinds: the protocols it implements.
        summary: what it does, one clause.
        paper: authors, title and venue of the source.
        url: where the source can be read.
        fitted: whether a `fit` step builds or trains what it owns.
    """

    slug: str
    room: str
    name: str
    kinds: tuple[Kind, ...]
    summary: str
    paper: str
    url: str
    fitted: bool = False

    @property
    def module(self) -> str:
        """The module that defines the class."""
        return f"intaglio.methods.{self.room}.{self.slug}"


ENTRIES: dict[str, Entry] = {
    entry.slug: entry
    for entry in (
        Entry(
            slug="aded",
            room="decoding",
            name="ADED",
            kinds=("decoder", "drafter"),
            summary="drafts by tree search over a tri-gram table that learns from what the target says; lossless",
            paper="Liu et al., Adaptive Draft-Verification for Efficient Large Language Model Decoding, AAAI 2025",
            url="https://arxiv.org/abs/2407.12021",
            fitted=True,
        ),
        Entry(
            slug="bip",
            room="weights",
            name="BiP",
            kinds=("modifier",),
            summary="learns which weights to keep while it trains them: weights and mask scores step in turn",
            paper="Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022",
            url="https://arxiv.org/abs/2210.04092",
        ),
        Entry(
            slug="bitnet",
            room="weights",
            name="BitNet",
            kinds=("carving", "modifier"),
            summary="trains ternary weights and 8-bit activations by straight-through rounding, and packs them",
            paper="Nielsen and Schneider-Kamp, BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller "
            "Networks, DeLTA 2024",
            url="https://arxiv.org/abs/2407.09527",
        ),
        Entry(
            slug="blockffn",
            room="activations",
            name="BlockFFN",
            kinds=("modifier",),
            summary="trains experts behind a ReLU router in the place of MLPs, few of which fire, for runs of tokens "
            "the same",
            paper="Song et al., BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level "
            "Activation Sparsity, COLM 2025",
            url="https://arxiv.org/abs/2507.08771",
        ),
        Entry(
            slug="chimera",
            room="decoding",
            name="Chimera",
            kinds=("decoder", "drafter"),
            summary="drafts with one trained layer over the target's hidden states and tri-grams of tokens; lossless",
            paper="Zeng et al., Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference "
            "by Fusing all Tokens, 2024",
            url="https://arxiv.org/abs/2402.15758",
            fitted=True,
        ),
        Entry(
            slug="dsnot",
            room="weights",
            name="DSnoT",
            kinds=("carving",),
            summary="refines a pruning mask without training, swapping weights to cancel the expected output error",
            paper="Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, ICLR 2024",
            url="https://arxiv.org/abs/2310.08915",
        ),
        Entry(
            slug="dyspec",
            room="decoding",
            name="DySpec",
            kinds=("decoder", "drafter"),
            summary="grows a draft model's token tree where the draft itself expects to be accepted; lossless",
            paper="Xiong et al., DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, "
            "World Wide Web Journal 2025",
            url="https://arxiv.org/abs/2410.11744",
        ),
        Entry(
            slug="hidden_transfer",
            room="decoding",
            name="HiddenTransfer",
            kinds=("decoder", "drafter"),
            summary="drafts inside the target's pass, by trained maps to pseudo states of future tokens; lossless",
            paper="Wu et al., Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration, "
            "2024",
            url="https://arxiv.org/abs/2404.12022",
            fitted=True,
        ),
        Entry(
            slug="layerwise_unmasking",
            room="attention",
            name="LayerwiseUnmasking",
            kinds=("carving", "visibility"),
            summary="takes the causal mask off groups of layers, so that a decoder labels tokens seeing both ways",
            paper="Dukić and Šnajder, Looking Right is Sometimes Right: Investigating the Capabilities of "
            "Decoder-only LLMs for Sequence Labeling, Findings of ACL 2024",
            url="https://arxiv.org/abs/2401.14556",
        ),
        Entry(
            slug="lost",
            room="weights",
            name="LOST",
            kinds=("carving",),
            summary="replaces each projection by a low-rank pair and a few whole columns, to train from scratch in "
            "less memory",
            paper="Li et al., LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025",
            url="https://arxiv.org/abs/2508.02668",
        ),
        Entry(
            slug="lud",
            room="decoding",
            name="LUD",
            kinds=("objective", "decoder", "drafter"),
            summary="trains a model to say the rest of a lexical unit in one pass, and decodes so; lossless only if it "
            "verifies",
            paper="Sun et al., Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for "
            "LLMs, LREC-COLING 2024",
            url="https://arxiv.org/abs/2405.15208",
        ),
        Entry(
            slug="magnitude",
            room="weights",
            name="Magnitude",
            kinds=("carving",),
            summary="removes the smallest weights of each layer; needs no data",
            paper="Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015",
            url="https://arxiv.org/abs/1506.02626",
        ),
        Entry(
            slug="meap",
            room="objectives",
            name="MEAP",
            kinds=("objective",),
            summary="hides a small share of the input tokens while training, then predicts every next token as usual",
            paper="Zhuang et al., Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More, ICML 2025",
            url="https://arxiv.org/abs/2502.07490",
        ),
        Entry(
            slug="moe_x",
            room="activations",
            name="MoEX",
            kinds=("carving", "modifier"),
            summary="makes experts of each MLP and sends a token to those expected to be sparsest: units to be read",
            paper="Yang et al., Mixture of Experts Made Intrinsically Interpretable, ICML 2025",
            url="https://arxiv.org/abs/2503.07639",
        ),
        Entry(
            slug="omp_transplant",
            room="weights",
            name="OMPTransplant",
            kinds=("carving",),
            summary="gives a model another model's tokenizer without training, new rows coded by shared tokens",
            paper="Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching "
            "Pursuit, 2025",
            url="https://arxiv.org/abs/2506.06607",
        ),
        Entry(
            slug="paser",
            room="training",
            name="PASER",
            kinds=("selector",),
            summary="chooses the few instructions that win back most of what pruning lost, by how far the model is "
            "from its original on them",
            paper="He et al., PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery, "
            "ICLR 2026",
            url="https://arxiv.org/abs/2502.12594",
        ),
        Entry(
            slug="progressive_nm",
            room="weights",
            name="ProgressiveNM",
            kinds=("modifier",),
            summary="trains with N:M zeros that come by degrees: pruned weights fade out, or the pattern is tightened",
            paper="Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, "
            "CPAL 2025",
            url="https://arxiv.org/abs/2402.04744",
        ),
        Entry(
            slug="r_sparse",
            room="activations",
            name="RSparse",
            kinds=("carving",),
            summary="lets each token read only the columns of a weight that matter to it, and a low rank for the rest",
            paper="Zhang et al., R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, ICLR 2025",
            url="https://arxiv.org/abs/2504.19449",
        ),
        Entry(
            slug="sparsegpt",
            room="weights",
            name="SparseGPT",
            kinds=("carving",),
            summary="removes weights one column at a time and lets the rest of the row make up for each",
            paper="Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot, "
            "ICML 2023",
            url="https://arxiv.org/abs/2301.00774",
        ),
        Entry(
            slug="wanda",
            room="weights",
            name="Wanda",
            kinds=("carving",),
            summary="removes the weights with the smallest |weight| times input norm, row by row",
            paper="Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024",
            url="https://arxiv.org/abs/2306.11695",
        ),
    )
}
