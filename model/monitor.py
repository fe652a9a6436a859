"""How training goes, measured on what a step computes anyway: projections z and features h.

    contrast(first, second, temperature)                accuracy and entropy of the contrast, alignment, uniformity
    probe = OnlineProbe(encoder, num_classes, device)   a linear classifier, trained on detached features

Neither encodes an image, draws a random number or waits for the device.
Chen et al. 2020, arXiv:2002.05709, section 5.1 and appendix B.6; Wang and Isola 2020, arXiv:2005.10242.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from model.encoder import Encoder
from model.nt_xent_rows import unit_rows
from model.probe import zero_linear

MAX_SIMILARITIES = 1 << 22  # in one matrix: 16 MiB of float32, and all rows up to a batch of 2048
PROBE_LR = 16.0  # divided by num_features, the squared length of standardised features


@torch.no_grad()
def contrast(first: Tensor, second: Tensor, temperature: float) -> dict[str, Tensor]:
    """How well first views tell their second views from those of other images: () float32 tensors by name.

    first        (n, D) projections of first views, of any length; where n·N is more than MAX_SIMILARITIES only as many
                 rows count as stay below, the first ones, for batches are shuffled.
    second       (N, D), N ≥ n, of second views: of the same images in the same order, then of any others.
    temperature  of the loss.
    contrast_accuracy  0 … 1: first views whose own second view is the most similar of all N.
    contrast_entropy   0 … log N, in nats: of the softmax of similarity / temperature over the N, on average. This and
                       the accuracy are what the authors' code logs and Table 5 of the paper gives.
    alignment          0 … 4: squared distance of an image's two views on the unit sphere, on average.
    uniformity         -8 … 0: log of the average exp(-2 · squared distance) over views of two different images. These
                       two are Wang and Isola's with their exponents; the lower, the better. NaN for a single image.
    """
    rows = max(1, min(len(first), MAX_SIMILARITIES // len(second)))
    (u, _), (v, _) = unit_rows(first[:rows].float()), unit_rows(second.float())
    similarity = u @ v.T
    logits = torch.log_softmax(similarity / temperature, 1)
    own = torch.arange(rows, device=u.device)
    potential = (4 * (similarity - 1)).exp().fill_diagonal_(0)  # |u - v|² = 2 - 2 u·v
    return {
        "contrast_accuracy": (similarity.argmax(1) == own).float().mean(),
        "contrast_entropy": -(logits.exp() * logits).sum(1).mean(),
        "alignment": (u - v[:rows]).square().sum(1).mean(),
        "uniformity": (potential.sum() / (rows * (len(v) - 1))).log(),
    }


class OnlineProbe:
    """A linear classifier, trained during the run on the encoder's detached features of both views.

    No gradient reaches the encoder: weights, loss and random numbers of the run are bitwise those without a probe.
    Features are standardised over the micro-batch, because their scale changes during training. Plain SGD at a constant
    rate needs no state but `linear`. Only one process (in a run the main one) has a probe, and trains it on its own
    images, so that nothing is exchanged.
    """

    def __init__(self, encoder: Encoder, num_classes: int, device: torch.device | str) -> None:
        """The encoder is on `device`; a forward hook keeps its last output from now on."""
        self.linear = zero_linear(encoder.num_features, num_classes).to(device).requires_grad_(False)
        self._features = self._logits = self._labels = torch.empty(0)  # of the last micro-batch
        encoder.register_forward_hook(self._keep_features)

    def _keep_features(self, _module: nn.Module, _inputs: Any, features: Tensor) -> None:
        self._features = features.detach()

    @torch.no_grad()
    def learn(self, labels: Tensor, share: float) -> None:
        """One step of gradient descent on the micro-batch that the encoder encoded last.

        labels  (m,) int64 on the CPU; ValueError for one that is no class.
        share   of the batch that the micro-batch is; the step is proportional to it.
        Features that are not finite count as 0.
        """
        low, high = map(int, labels.aminmax())
        if low < 0 or high >= self.linear.out_features:
            raise ValueError(
                f"labels run from {low} to {high}, expected 0 to {self.linear.out_features - 1}: mend the data set, or "
                "train without the probe"
            )
        if self._features.is_cuda:
            labels = labels.pin_memory().to(self._features.device, non_blocking=True)
        self._labels = labels.repeat(2)
        x = batch_norm(self._features.float(), None, None, training=True).nan_to_num_(0, 0, 0)
        self._logits = self.linear(x)
        # By hand: with autograd and an optimizer it took 1.7 times as long at the demo's size on a CPU.
        error = self._logits.softmax(1)
        error.scatter_add_(1, self._labels[:, None], error.new_full((len(x), 1), -1))
        rate = share * PROBE_LR / x.numel()
        self.linear.weight.addmm_(error.T, x, alpha=-rate)
        self.linear.bias.sub_(error.sum(0), alpha=rate)

    def accuracy(self) -> Tensor:
        """() 0 … 1, on both views of the last micro-batch, before it was learned."""
        return (self._logits.argmax(1) == self._labels).float().mean()
