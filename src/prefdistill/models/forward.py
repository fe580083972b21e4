"""The one forward: a tree batch goes once through a model, log-probs or rewards of its responses come out.

It uses what every attention model of transformers accepts: position ids, and either an attention function of its own
(trees packed into one row, no padding) or a 4-D mask (a padded row a tree). So a new family costs nothing.
Whether a model honours them is measured, not looked up: a probe compares its tree forward with its plain forward and
checks that one response cannot see another. A model that fails (state-space, hybrid, ALiBi, FlashAttention) takes the
plain path, one sequence a response, and the log says so once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefdistill.data.checks import words_of
from prefdistill.data.tree import Place, Tree, TreeBatch, collate_packed, collate_plain, collate_trees, tree_mask
from prefdistill.errors import ConfigError
from prefdistill.models import flash
from prefdistill.models.allocator import keep_freed_memory
from prefdistill.models.attention import carrier_mask, give_back, take_over
from prefdistill.models.backbone import REFUSALS, backbone_of, device_of, heads_of, tolerance_of, unwrap
from prefdistill.models.compiled import has_compiled_layers
from prefdistill.models.gates import fuse_gates
from prefdistill.models.head import Scaling, head_logps
from prefdistill.models.linears import speed_up_linears
from prefdistill.models.norms import lighten_norms
from prefdistill.models.past import Past
from prefdistill.models.rotary import fuse_rotary

logger = logging.getLogger(__name__)

Path = Literal["packed", "tree", "plain"]
PROBE_WINDOW = 4
SIBLING = 0.01  # of the tolerance: an expert's product rounds by its number of rows, and siblings are among them


class TreeModel:
    """A model with the forward over tree batches.

    Args:
        model: a causal language model, or a sequence classifier with one label and a head named `score`.
        path: "packed", "tree", "plain", or None to probe the model (some tiny forwards) for the first of them that it
            can go; packed is for CPUs and for GPUs with flash kernels.
    """

    def __init__(self, model: nn.Module, *, path: Path | None = None) -> None:
        self.model = model
        self.core: Any = unwrap(model)
        self.backbone: Any = backbone_of(model)
        self.config: Any = self.core.config.get_text_config()
        self.pad_id = int(self.config.pad_token_id or 0)
        self._mask_form = "plain"
        self._own_logits = False
        compiled = has_compiled_layers(self.backbone)
        if not compiled:
            fuse_gates(self.backbone)  # what the last layer leaves out is under the probe too
            fuse_rotary(self.backbone)
            speed_up_linears(self.backbone)
        if path is None:
            self.path, self._mask_form = _probe(self)
        else:
            self.path = path
            if path == "packed" and not take_over(self.core):
                raise ConfigError(f"{type(self.core).__name__} cannot take the packed path: it does not attend by sdpa")
            if path != "plain":
                self._mask_form = _mask_forms(self.config)[0]
        if device_of(model).type == "cpu":
            keep_freed_memory()
        if not compiled:
            lighten_norms(self.backbone)  # for scoring as for training: a policy's first margins are zero to the bit
        self._own_logits = not _head_is_known(self)

    def collate(self, trees: Sequence[Tree], *, pool_pad_id: int | None = None) -> TreeBatch:
        """The batch that this model's path reads, on its device."""
        return _COLLATE[self.path](trees, pad_id=self.pad_id, pool_pad_id=pool_pad_id).to(device_of(self.model))

    def hidden(self, batch: TreeBatch, *, read: Tensor | None = None) -> Tensor:
        """Final hidden states, [B * T, H].

        Args:
            read: the positions that are read of them, `batch.source` and `batch.last` where it is not given. At others
                they can be anything: the last layer's MLP need not run there.
        """
        read = torch.cat([batch.source, batch.last]) if read is None else read
        out = self.backbone(**self._inputs(batch, read.unique()))
        states = getattr(out, "last_hidden_state", None)
        if states is None:
            raise ConfigError(
                f"{type(self.core).__name__} gives no hidden states where other causal models of transformers do; it "
                "cannot be trained or scored here"
            )
        return states.flatten(0, 1)

    def _inputs(self, batch: TreeBatch, read: Tensor | None = None) -> dict[str, Any]:
        mask: Any = (batch.segments >= 0).long() if batch.kind == "plain" else self._masks(batch, read)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }

    def _masks(self, batch: TreeBatch, read: Tensor | None) -> Any:
        if batch.kind == "packed":
            return self.carriers(batch.places, read=read)
        return self._by_layer(lambda w: self._as_bias(tree_mask(batch.segments, batch.position_ids, window=w)))

    def carriers(self, places: Sequence[Place], past: Past | None = None, read: Tensor | None = None) -> Any:
        """The masks to give to the model with a packed row; with a past, prompts or what goes on from them."""
        device = device_of(self.model)
        return self._by_layer(lambda w: carrier_mask(places, window=w, device=device, past=past, read=read))

    def _by_layer(self, mask_of: Callable[[int | None], Tensor]) -> Any:
        """`mask_of` a window in the form that the model takes: one mask, or one for each type of layer."""
        window = getattr(self.config, "sliding_window", None)

        def mask(layer_type: str) -> Tensor:
            return mask_of(window if layer_type == "sliding_attention" else None)

        if self._mask_form == "by layer type":
            return {layer_type: mask(layer_type) for layer_type in dict.fromkeys(self.config.layer_types)}
        return mask(self._mask_form)

    def _as_bias(self, visible: Tensor) -> Tensor:
        if self.config._attn_implementation != "eager":
            return visible
        dtype = next(self.backbone.parameters()).dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    def token_logps(self, batch: TreeBatch, hidden: Tensor | None = None) -> Tensor:
        """Log-probs of the response tokens, [N] float32; the head runs at these positions only.

        A model whose logits are not its head of its hidden states, scaled in a known way, is asked for them itself.
        """
        if self._own_logits:
            return self._model_token_logps(batch)
        hidden = self.hidden(batch, read=batch.source) if hidden is None else hidden
        head = self.core.get_output_embeddings()
        return head_logps(head, Scaling.of(self.config), hidden[batch.source], batch.target)

    def _model_token_logps(self, batch: TreeBatch) -> Tensor:
        logits = self.core(**self._inputs(batch)).logits.flatten(0, 1)[batch.source].float()
        return logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]

    def logps(self, batch: TreeBatch, hidden: Tensor | None = None) -> Tensor:
        """log pi(y|x) of every response in nats: the SUM over its tokens, end token included, [R] float64.

        Summed in float64, since a float32 sum of 100 tokens loses 1e-5 by itself.
        """
        tokens = self.token_logps(batch, hidden)
        total = torch.zeros(batch.responses, dtype=torch.float64, device=tokens.device)
        return total.index_add(0, batch.response_of, tokens.double())

    def features(self, batch: TreeBatch, hidden: Tensor | None = None) -> Tensor:
        """Hidden state that a reward head reads, [R, H] float32: the one at `batch.last`."""
        hidden = self.hidden(batch, read=batch.last) if hidden is None else hidden
        return hidden[batch.last].float()

    def rewards(self, batch: TreeBatch) -> Tensor:
        """Rewards of a sequence classifier's `score` head, [R] float32.

        The head itself runs in its weights' precision: bfloat16 would round a reward near 5 to steps of 0.03.
        """
        pooled = self.hidden(batch, read=batch.last)[batch.last]
        dtype = next(self.core.score.parameters()).dtype
        with torch.autocast(pooled.device.type, enabled=False):
            return self.core.score(pooled.to(dtype))[:, 0].float()


_COLLATE: dict[str, Callable[..., TreeBatch]] = {
    "packed": collate_packed,
    "tree": collate_trees,
    "plain": collate_plain,
}


# -- which path a model takes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """Two trees; the same with another first response, which nothing else may see; one sequence a response."""

    trees: list[Tree]
    other: list[Tree]
    plain: TreeBatch


def _mask_forms(config: Any) -> list[str]:
    forms = []
    if getattr(config, "layer_types", None):
        forms.append("by layer type")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        forms.append("sliding_attention")
    return [*forms, "full_attention"]


@contextlib.contextmanager
def small_window(config: Any) -> Iterator[None]:
    """A window that the probe's few tokens go beyond, so that a wrong mask shows."""
    window = getattr(config, "sliding_window", None)
    if not window:
        yield
        return
    config.sliding_window = min(window, PROBE_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


def _probe(model: TreeModel) -> tuple[Path, str]:
    v = int(model.config.vocab_size)
    ids = [(7 * i + 3) % v for i in range(24)]
    prompt, a, b = tuple(ids[:9]), tuple(ids[9:16]), tuple(ids[16:22])
    changed, second = tuple((i + v // 2 + 1) % v for i in a), Tree(b, (prompt[:3],))
    trees = [Tree(prompt, (a, b)), second]
    plain = collate_plain(trees, pad_id=model.pad_id).to(device_of(model.model))
    probe = _Probe(trees, [Tree(prompt, (changed, b)), second], plain)
    training = model.model.training
    model.model.eval()
    reasons = []
    try:
        with torch.no_grad(), small_window(model.config):
            truth = model.hidden(probe.plain)[probe.plain.source].float()
            for path in _paths(model):
                model.path = path
                for form in _mask_forms(model.config):
                    model._mask_form = form
                    reason = _mismatch(model, probe, truth)
                    if reason is None:
                        return path, form
                    reasons.append(f"{form}: {reason}")
                if path == "packed":
                    logger.info("%s: trees are padded, not packed (%s)", type(model.core).__name__, "; ".join(reasons))
                    give_back(model.core)
                    reasons.clear()
    finally:
        model.model.train(training)
    logger.warning(
        "%s takes the plain path, one sequence a response, which is slower (%s).%s",
        type(model.core).__name__,
        "; ".join(reasons),
        " Load it with attn_implementation='sdpa' for the tree path."
        if "flash" in str(model.config._attn_implementation)
        else "",
    )
    return "plain", "plain"


def _paths(model: TreeModel) -> list[Path]:
    # A block is some small products: on a GPU without flash kernels each would be a launch of its own.
    device = device_of(model.model)
    shape = heads_of(model.config) or flash.SHAPE
    packs = device.type == "cpu" or (device.type == "cuda" and flash.works(device, shape))
    return ["packed", "tree"] if packs and take_over(model.core) else ["tree"]


def _head_is_known(model: TreeModel) -> bool:
    """Whether log-probs from hidden states are those of the model's own logits; said once in the log where not.

    Families scale their logits under many names, and not all are known here.
    """
    head = getattr(model.core, "get_output_embeddings", lambda: None)()
    if head is None:
        return True  # a classifier: its rewards come from hidden states
    v = int(model.config.vocab_size)
    ids = tuple((5 * i + 2) % v for i in range(12))
    batch = model.collate([Tree(ids[:7], (ids[7:],))])
    training = model.model.training
    model.model.eval()
    try:
        with torch.no_grad():
            ours, truth = model.token_logps(batch), model._model_token_logps(batch)
    finally:
        model.model.train(training)
    gap = float((ours - truth).abs().max())
    if gap <= tolerance_of(model.model) * max(1.0, float(truth.abs().max())):
        return True
    logger.warning(
        "%s scales its logits in a way of its own (off by %.2g nats a token): they are computed at every position, "
        "which takes more memory.",
        type(model.core).__name__,
        gap,
    )
    return False


def _mismatch(model: TreeModel, probe: _Probe, truth: Tensor) -> str | None:
    """Why the tree forward is not the plain forward for this model, or None if it is."""
    try:
        batch, changed = model.collate(probe.trees), model.collate(probe.other)
        tree = model.hidden(batch)[batch.source].float()
        other = model.hidden(changed)[changed.source].float()
    except REFUSALS as error:
        return words_of(error)
    same, tolerance = batch.response_of > 0, tolerance_of(model.backbone)
    scale = truth.pow(2).mean().sqrt().clamp_min(1e-6)
    if float((tree[same] - other[same]).abs().max() / scale) > SIBLING * tolerance:
        return "a response sees its sibling"
    worst = float((tree - truth).abs().max() / scale)
    return None if worst <= tolerance else f"differs from the plain forward by {worst:.2g} of the hidden state's size"
