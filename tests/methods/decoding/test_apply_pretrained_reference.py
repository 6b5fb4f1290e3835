"""Apply-pretrained against independent implementations, written from the definitions in plain tensor algebra."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.methods.decoding.apply_pretrained.conditional_search import SearchedText, conditional_beam_search
from intaglio.methods.decoding.apply_pretrained.hidden_state_optimization import CacheOptimizer, hso_score
from intaglio.methods.decoding.apply_pretrained.recurrence import WindowedModel, WindowRecurrence
from intaglio.methods.decoding.apply_pretrained.seq2seq import MlmSeq2Seq
from tests.families import HEADS, tiny_model
from tests.methods.decoding.test_apply_pretrained_search import END, MOST, Letters
from tests.plain_llama import heads, llama

IDS = torch.randint(8, 150, (2, 23), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any, ids: Tensor, **more: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    normed, hidden, own = llama(model, model.model.embed_tokens.weight[ids], **more)
    return normed @ model.lm_head.weight.T, hidden, own


@pytest.mark.parametrize(("slots", "feed"), [(1, False), (2, True)])
@torch.no_grad()
def test_recurrence_is_an_extra_key_and_value_made_of_the_mean(slots: int, feed: bool) -> None:
    """z = mean over tokens of h at l_out; r = MLP(z); k = W_k r, v = W_v r; positions restart at 0 in each window."""
    model = tiny_model("llama", layers=3, dtype=torch.float64)
    network = WindowRecurrence(32, slots, feed, bias=-0.7, seed=2).double()
    ours = WindowedModel(model, network, [2, 1]).logits(IDS, 7)
    state, pieces = None, []
    for window in IDS.split(7, 1):
        inserted = {} if state is None else {1: (state, network.bias)}
        logits, hidden, _ = logits_of(model, window, slots=inserted)
        z = hidden[2].mean(1)
        if feed:
            z = torch.cat([z, torch.zeros(2, slots * 32).double() if state is None else state.flatten(1)], 1)
        for number in (0, 2, 4):
            z = z @ network.layers[number].weight.T + network.layers[number].bias
            z = z if number == 4 else z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        r = z.view(2, slots, 32)
        centred = r - r.mean(-1, keepdim=True)
        state = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * network.norm.weight
        state = state + network.norm.bias
        pieces.append(logits)
    assert torch.allclose(ours, torch.cat(pieces, 1), atol=1e-4)


@pytest.mark.parametrize(("rule", "step_size"), [("sgd", 0.3), ("rms", 0.05)])
@pytest.mark.parametrize(("memory", "steps"), [(None, 1), (9, 2)])
def test_hidden_state_optimization_is_descent_on_cached_keys_and_values(
    rule: Any, step_size: float, memory: int | None, steps: int
) -> None:
    """Report log P(x) before any update; g = dL/dH; H <- H - step; append the window's own states; drop the oldest."""
    model = tiny_model("llama", layers=2, dtype=torch.float64)
    past: list[Tensor] = []
    losses = []
    for start in range(0, IDS.shape[1] - 1, 5):
        inputs, targets = IDS[:, :-1][:, start : start + 5], IDS[:, 1:][:, start : start + 5]
        for turn in range(steps if past else 1):
            past = [x.detach().requires_grad_() for x in past]
            logits, _, own = logits_of(model, inputs, start=start, past=past)
            nll = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
            if turn == 0:
                losses.append(nll.detach())
            # The window's own states are those of its last reading, before the update that follows it.
            gradients = torch.autograd.grad(nll.sum(), past) if past else []
            for index, g in enumerate(gradients):
                if rule == "rms":
                    g = torch.stack([row / row.square().mean().sqrt() for row in g])
                past[index] = past[index] - step_size * g
        joined = [torch.cat([a, b], 2) for a, b in zip(past, own, strict=True)] if past else own
        past = [x.detach()[:, :, -memory:] if memory else x.detach() for x in joined]
    ours = hso_score(model, IDS, 5, CacheOptimizer(rule=rule, step_size=step_size, memory=memory, steps=steps))
    assert torch.allclose(ours.double(), torch.cat(losses, 1), atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_conditional_beams_keep_the_best_of_all_extensions(beams: int) -> None:
    """S(x_1:t) = log P(x_1:t) + log q(a | x_1:t): extend, add log q, keep the B best; compare the finished by S."""
    for seed in range(6):
        model, draws = Letters(seed, end=0.1), torch.Generator().manual_seed(seed)
        q = {text: -3 * float(torch.rand((), generator=draws)) for text in model.texts}
        kept, finished = [((), 0.0)], []
        for _ in range(MOST + 1):
            extensions = []
            for prefix, log_prob in kept:
                row = model.rows[prefix].double().tolist()
                extensions.append((log_prob + row[END] + 0.8 * q[prefix], prefix, log_prob + row[END], True))
                if len(prefix) < MOST:
                    longer = [((*prefix, token), log_prob + row[token]) for token in (0, 1)]
                    extensions += [(total + 0.8 * q[text], text, total, False) for text, total in longer]
            ranked = sorted(extensions, key=lambda one: -one[0])
            finished += [SearchedText(text, total, score, END) for score, text, total, end in ranked[:beams] if end]
            kept = [(text, total) for _, text, total, end in ranked if not end][:beams]

        def log_q(prefixes: Any, hidden: Tensor | None, tokens: Tensor, q: Any = q) -> Tensor:
            rows = [[q.get(prefix if token == END else (*prefix, token), -math.inf) for token in row]
                    for prefix, row in zip(prefixes, tokens.tolist(), strict=True)]  # fmt: skip
            return torch.tensor(rows, dtype=torch.float64)

        ours = conditional_beam_search(model, [END], MOST + 1, beams=beams, attribute=log_q, top_k=3, gamma=0.8)
        expected = sorted(finished, key=lambda text: -text.score)[:beams]
        assert [text.tokens for text in ours] == [text.tokens for text in expected]
        assert [text.score for text in ours] == pytest.approx([text.score for text in expected], abs=1e-6)


@torch.no_grad()
def test_the_decoder_is_the_masked_model_with_cross_attention_in_every_block() -> None:
    """Self-attention stays bidirectional; cross-attention is added per layer; output = the MLM head."""
    model = tiny_model("bert", layers=2, dtype=torch.float64)
    network = MlmSeq2Seq(model, 20).eval()
    for name, value in network.named_parameters():
        if "crossattention.output.dense" in name:
            torch.nn.init.normal_(value, 0, 0.3)
    source, draft = IDS[:, :7], IDS[:, 7:16]
    seen_S, seen_L = torch.ones(2, 7), torch.ones(2, 9)
    seen_S[0, 5:], seen_L[1, 6:] = 0, 0

    def full(part: Any, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
        """Attention of x to the seen positions of y, with its output projection."""
        q, k, v = (heads(f(z), HEADS) for f, z in ((part.self.query, x), (part.self.key, y), (part.self.value, y)))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None, None].bool(), -math.inf)
        projected: Tensor = part.output.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return projected

    def stack(bert: Any, ids: Tensor, seen: Tensor, encoded: Tensor | None = None) -> Tensor:
        e = bert.embeddings
        x = e.word_embeddings.weight[ids] + e.position_embeddings.weight[: ids.shape[1]]
        x = e.LayerNorm(x + e.token_type_embeddings.weight[0])
        for block in bert.encoder.layer:
            x = block.attention.output.LayerNorm(x + full(block.attention, x, x, seen))
            if encoded is not None:
                x = x + full(block.crossattention, x, encoded, seen_S)
            x = block.output.LayerNorm(x + block.output.dense(F.gelu(block.intermediate.dense(x))))
        return x

    expected = network.decoder.cls(stack(network.decoder.bert, draft, seen_L, stack(model.bert, source, seen_S)))
    ours = network(draft, seen_L.long(), network.encode(model, source, seen_S.long()), seen_S.long())
    assert torch.allclose(ours, expected, atol=1e-8)
